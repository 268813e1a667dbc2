"""The web page in a tab of a browser, as tests use it."""

from pathlib import Path

from playwright.async_api import ConsoleMessage, Locator, Page, expect

RESULTS = Path("test-results/page")
"""Where pictures of the page are kept."""


class Tab:
    """A page of the server, signed in unless told otherwise. `announced` are parts of errors that are expected."""

    def __init__(self, page: Page, url: str, key: str) -> None:
        self.page = page
        self.url = url
        self.key = key
        self.announced: list[str] = []
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def open(self, where: str = "") -> None:
        """Sign in by the address, as `cellvm serve` prints it, and go there."""
        await self.page.goto(f"{self.url}/#key={self.key}")
        await expect(self.page.get_by_role("button", name="Sign out")).to_be_visible()
        if where:
            await self.page.goto(f"{self.url}/#/{where}")

    async def run(self, code: str) -> Locator:
        """Run a cell by the editor. Returns it."""
        editor = self.page.get_by_role("textbox", name="Code of the next cell")
        await editor.fill(code)
        await self.page.keyboard.press("Shift+Enter")
        return self.cell(code.split("\n")[0])

    def cell(self, code: str) -> Locator:
        """The newest cell with that text in its code."""
        return self.page.locator("article", has=self.page.locator(".code", has_text=code)).last

    def check(self) -> None:
        strange = [text for text in self.complaints if not any(part in text for part in self.announced)]
        assert not strange, strange
        away = [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]
        assert not away, away
