"""A drawing of boxes and arrows as SVG, on a card of its own: readable on a light page and on a dark one."""

import dataclasses
from html import escape

# Each kind of line or text has one colour on the light card and one on the dark card.
COLOURS = {
    "ink": ("#24292f", "#e6edf3"),
    "forward": ("#57606a", "#9da7b3"),
    "error": ("#b42318", "#ff8a7a"),
    "fixed": ("#1d4ed8", "#8ab4ff"),
    "learned": ("#15803d", "#5fd38a"),
    "other": ("#7e22ce", "#d0a5ff"),
    "quiet": ("#8c959f", "#6e7681"),
}
CARD, FILL = ("#f6f8fa", "#161b22"), ("#ffffff", "#21262d")


def _style() -> str:
    def rules(which: int) -> str:
        lines = [f".card{{fill:{CARD[which]}}} .box{{fill:{FILL[which]}}}"]
        for name, colours in COLOURS.items():
            colour = colours[which]
            lines.append(f".{name}{{stroke:{colour}}} .t-{name},.h-{name}{{fill:{colour}}}")
        return "\n".join(lines)

    base = "text{font-family:system-ui,'DejaVu Sans',sans-serif;text-anchor:middle}"
    return f"<style>{base}\n{rules(0)}\n@media (prefers-color-scheme:dark){{\n{rules(1)}\n}}</style>"


@dataclasses.dataclass
class Drawing:
    """Boxes, arrows and words; `svg()` gives the file."""

    title: str
    width: int = 660
    height: int = 250
    parts: list[str] = dataclasses.field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "ink", size: int = 15) -> None:
        """Words around the point (x, y)."""
        place = f'x="{x:g}" y="{y + size * 0.35:g}"'
        self.parts.append(f'<text class="t-{kind}" {place} font-size="{size}">{escape(words)}</text>')

    def box(self, x: float, y: float, words: str, kind: str = "ink", wide: float = 56, high: float = 36) -> None:
        """A box with words, around the point (x, y)."""
        place = f'x="{x - wide / 2:g}" y="{y - high / 2:g}" width="{wide:g}" height="{high:g}"'
        self.parts.append(f'<rect class="box {kind}" {place} rx="6" stroke-width="1.6"/>')
        self.text(x, y, words, "ink" if kind == "forward" else kind)

    def circle(self, x: float, y: float, words: str, kind: str = "error", radius: float = 17) -> None:
        """A circle with words."""
        place = f'cx="{x:g}" cy="{y:g}" r="{radius:g}"'
        self.parts.append(f'<circle class="box {kind}" {place} stroke-width="1.6"/>')
        self.text(x, y, words, kind)

    def frame(self, x: float, y: float, wide: float, high: float, kind: str = "other") -> None:
        """A dashed frame, from its upper left corner."""
        place = f'x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}"'
        self.parts.append(
            f'<rect class="{kind}" {place} rx="10" fill="none" stroke-width="1.8" stroke-dasharray="6 4"/>'
        )

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        kind: str = "forward",
        words: str = "",
        *,
        bend: float = 0,
        dashed: bool = False,
        above: float = -13,
    ) -> None:
        """An arrow with words at its middle; `bend` moves its middle down."""
        (x0, y0), (x1, y1) = start, end
        mx, my = (x0 + x1) / 2, (y0 + y1) / 2 + bend
        dx, dy = (x1 - mx, y1 - my) if bend else (x1 - x0, y1 - y0)
        length = (dx * dx + dy * dy) ** 0.5 or 1.0
        ux, uy = dx / length, dy / length
        tx, ty = x1 - 8 * ux, y1 - 8 * uy  # the line ends where the head begins
        path = f"M{x0:g} {y0:g} " + (f"Q{mx:g} {my:g} " if bend else "L") + f"{tx:g} {ty:g}"
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path class="{kind}" d="{path}" fill="none" stroke-width="1.8"{dash}/>')
        bx, by = x1 - 9 * ux, y1 - 9 * uy  # the foot of the head
        head = [(x1, y1), (bx - 4.5 * uy, by + 4.5 * ux), (bx + 4.5 * uy, by - 4.5 * ux)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
        self.parts.append(f'<polygon class="h-{kind}" points="{points}"/>')
        if words:
            self.text(mx, (y0 + y1) / 2 + bend / 2 + above, words, "ink" if kind == "forward" else kind, 14)

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        card = f'<rect class="card" x="0" y="0" width="{self.width}" height="{self.height}" rx="10"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", _style(), card, *self.parts, "</svg>"]) + "\n"
