"""Writes the pictures and fills the parts of the pages that follow from the code.

    python -m docs.generate           # all; the table of models x rules takes minutes
    python -m docs.generate --quick   # all but that table
"""  # fmt: skip

import os
import sys

# One of the networks is spread over devices: the processor then counts as four.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

from docs.generate import blocks, facts, pictures  # noqa: E402


def main() -> None:
    slow = "--quick" not in sys.argv
    for name, text in pictures.files().items():
        (facts.DOCS / "pictures" / name).write_text(text)
    for page in [*sorted(facts.DOCS.rglob("*.md")), facts.DOCS.parent / "README.md"]:
        old = page.read_text()
        new = blocks.filled(old, slow)
        if new != old:
            page.write_text(new)
            print(page.relative_to(facts.DOCS.parent))


if __name__ == "__main__":
    main()
