"""Makes .github/three-terminals.svg, the picture at the top of README.md, from a real run on a cluster of its own.

    python tests/picture.py

Run it again when a script says something else than before, and look at the picture in a browser.
"""

import io
import itertools
import re
import tempfile
from pathlib import Path

from conftest import ROOT, Script, create_topic, new_cluster
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

PICTURE = ROOT / ".github" / "three-terminals.svg"
EVENTS = 3
COLOURS = ["yellow", "green", "cyan"]  # An event has the same one in all terminals.
# Characters in a line. With more of them, the picture can't be read on a phone.
WIDTH = 61

# Rich's own frame of a window, without fonts from elsewhere: no browser loads them for a picture in a page.
# Each line appears at its time, once. Where people want no motion all lines are there at once.
TEMPLATE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
text {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
{styles}
@media (prefers-reduced-motion: no-preference) {{
@keyframes appear {{ from {{ opacity: 0 }} }}
DELAYS
}}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}{matrix}</g>
</svg>
"""


def main():
    svg = draw(*run())
    PICTURE.write_text(svg)
    print(f"{PICTURE}, {len(svg)} bytes")


def run():
    """Returns the lines that the producer, the consumer and the log show, in three lists."""
    with new_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        create_topic(cluster, "user-tracker")
        address = ["-b", cluster.bootstrap_servers]
        consumer = Script(Path(folder), "consumer", address)
        consumer.wait_for_stderr("Got partitions")
        told = consumer.stderr.splitlines()
        producer = Script(Path(folder), "producer", [*address, "--count", EVENTS])
        if producer.wait() != 0:
            raise SystemExit(f"picture.py: {producer!r}")
        printed = consumer.wait_for_lines(EVENTS)
        consumer.end()
        return producer.lines, told + printed, Path(folder, "producer.log").read_text().splitlines()


def draw(producer, consumer, log):
    """Returns the SVG of three terminals, one below the other."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), color_system="truecolor")
    number = itertools.count()
    delays = []

    def show(line, style="", delay=0):
        for row in Text(line, style).wrap(console, WIDTH):
            console.print(row)
            delays.append(
                f'[clip-path$="-{next(number)})"] {{ animation: appear 0.3s {delay}s backwards }}' * bool(delay)
            )

    terminals = [
        (f"python kafka_producer.py --count {EVENTS}", producer),
        ("python kafka_consumer.py", consumer),
        ("tail -f producer.log", log),
    ]
    for terminal, (command, lines) in enumerate(terminals, 1):
        show(f"── terminal {terminal} ".ljust(WIDTH, "─"), "bold blue")
        show(f"$ {command}", "bold")
        event = 0
        for line in lines:
            value = re.search(r"\{.*\}", line)
            if value:
                show(line.replace(value[0], shortened(value[0], line)), COLOURS[event], delay=event + 1)
                event += 1
            else:
                show(line, delay=event)
        show(" ")
    svg = console.export_svg(title="three terminals", theme=SVG_EXPORT_THEME, code_format=TEMPLATE, unique_id="t")
    return svg.replace("DELAYS", "\n".join(delays))


def shortened(value, line):
    """Returns the beginning of an event: a whole line of the consumer, and its number in the lines of the producer."""
    return f"{value[: WIDTH - 4]}...}}" if line == value else re.sub(r", .*", ", ...}", value)


if __name__ == "__main__":
    main()
