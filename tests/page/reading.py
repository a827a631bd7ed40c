"""What is read back from an open page."""

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 240_000
"""Milliseconds that a page has for what it does, beside other tests."""


def column(page, table: str, place: int) -> list[str]:
    """The texts of a column."""
    return page.locator(f"#{table} tbody tr > :nth-child({place + 1})").all_inner_texts()


def drawn(page, chart: str) -> list[dict]:
    """The traces of a chart, as it was drawn last."""
    page.locator(f"#{chart}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{chart} .main-svg, #{chart} .empty")
    return page.evaluate(f"JSON.parse(JSON.stringify(document.getElementById('{chart}').data ?? []))")
