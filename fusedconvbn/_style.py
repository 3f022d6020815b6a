"""How the project's pictures look: one colour for each thing that is compared, one font size, and
figures of `WIDTH` inches, which are read at the width of a page."""

# From the palette of Okabe and Ito, which colour-blind readers tell apart, darkened so far that
# text in these colours has the contrast of 4.5 : 1 on white.
FUSED, EAGER, COMPILED = "#0072b2", "#6f6f6f", "#b84a00"
CHECKPOINTS, IN_PLACE = "#00795a", "#a3467b"
WIDTH = 10.0

_INK = "#333333"
STYLE = {  # for matplotlib.rc_context
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 160,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
