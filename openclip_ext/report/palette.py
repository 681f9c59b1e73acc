"""The colours of rows: a run, a checkpoint, or a mixture looks the same in every picture."""

import matplotlib


def row_style(index: int) -> dict:
    """Colour and line of row number `index`: ten colours, then the same ten dashed, and so on."""
    return {"color": matplotlib.colormaps["tab10"](index % 10), "linestyle": ("-", "--", ":")[index // 10 % 3]}
