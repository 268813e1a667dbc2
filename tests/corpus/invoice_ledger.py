"""A double-entry ledger: every booking balances, and an unbalanced one is an error."""

# %%
from dataclasses import dataclass, field
from decimal import Decimal


class Unbalanced(ValueError):
    """A booking whose sides differ."""


@dataclass
class Ledger:
    accounts: dict = field(default_factory=dict)

    def book(self, text, **amounts):
        total = sum(Decimal(each) for each in amounts.values())
        if total:
            raise Unbalanced(f"{text}: off by {total}")
        for name, amount in amounts.items():
            self.accounts[name] = self.accounts.get(name, Decimal(0)) + Decimal(amount)
        print(f"booked {text}")


ledger = Ledger()
ledger.book("sale", receivable="119.00", revenue="-100.00", tax="-19.00")
ledger.book("payment", bank="119.00", receivable="-119.00")

# %%
try:
    ledger.book("typo", bank="10.00", cash="-1.00")
except Unbalanced as error:
    print("refused:", error)
ledger.accounts["bank"]

# %%
ledger.book("rent", rent="800.00", bank="-80.00")
