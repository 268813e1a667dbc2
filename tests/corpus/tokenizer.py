"""A calculator: tokens by regular expressions, a parser by precedence, and what Python's own parser says."""

# %%
import ast
import operator
import re

TOKEN = re.compile(r"\s*(?:(\d+\.?\d*)|(\*\*|.))")
POWERS = {
    "+": (1, 2, operator.add),
    "-": (1, 2, operator.sub),
    "*": (3, 4, operator.mul),
    "/": (3, 4, operator.truediv),
    "**": (8, 7, operator.pow),
}


class Parser:
    def __init__(self, text):
        self.tokens = [(number, sign) for number, sign in TOKEN.findall(text.strip())] + [("", "")]

    def expression(self, least=0):
        number, sign = self.tokens.pop(0)
        if number:
            left = float(number)
        elif sign == "(":
            left = self.expression()
            if self.tokens.pop(0)[1] != ")":
                raise ValueError("a parenthesis is missing")
        elif sign == "-":
            left = -self.expression(6)
        else:
            raise ValueError(f"unexpected {sign!r}")
        while (sign := self.tokens[0][1]) in POWERS and POWERS[sign][0] >= least:
            self.tokens.pop(0)
            left = POWERS[sign][2](left, self.expression(POWERS[sign][1]))
        return left


# %%
for text in ("1 + 2 * 3", "-2 ** 2", "2 ** 3 ** 2", "(1 + 2) * -3 / 4", "7 - 2 - 1"):
    value = Parser(text).expression()
    print(f"{text:<20} {value:g} {value == eval(compile(ast.parse(text, mode='eval'), '<text>', 'eval'))}")

# %%
Parser("(1 + 2").expression()
