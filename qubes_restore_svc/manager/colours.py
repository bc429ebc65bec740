"""Text colours that can be read on the palette that is in use, light or dark.

Strategy: two fixed sets, each with a contrast of at least 4.5 to 1 (WCAG 2.1, 1.4.3) to what windows and
lists have as their background in the usual light and dark palettes. A colour never says anything alone.
"""

from dataclasses import dataclass

from PyQt6.QtGui import QColor, QPalette


@dataclass(frozen=True, slots=True)
class TextColours:
    """Colours of text on the background of windows and lists."""

    good: QColor
    bad: QColor
    quiet: QColor


def text_colours(palette: QPalette) -> TextColours:
    """The colours for this palette."""
    if palette.color(QPalette.ColorRole.Base).lightness() < 128:
        return TextColours(good=QColor("#7bd88f"), bad=QColor("#ff9d94"), quiet=QColor("#b4b8be"))
    return TextColours(good=QColor("#14692c"), bad=QColor("#a81d14"), quiet=QColor("#55595f"))
