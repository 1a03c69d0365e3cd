"""Numbers as people read them."""


def short(number: float) -> str:
    """Returns a count in three digits: 999, 41.2k, 2.10M, 105M, 1.05B."""
    rounded = float(f"{number:.2e}")  # before the suffix is chosen: 999999 is 1.00M
    power = min((len(f"{rounded:.0f}") - 1) // 3, 4)
    if power == 0:
        return f"{rounded:.0f}"
    return f"{rounded / 1000**power:#.3g}".rstrip(".") + " kMBT"[power]
