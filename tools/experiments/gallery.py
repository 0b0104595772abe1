"""Write the page of all experiments: docs/results.md, and one self-contained HTML file, from the results' JSON.

python tools/experiments/gallery.py
python tools/experiments/gallery.py --html runs/results.html

For each experiment: the claim, the published figure, what came out, tables, plot, and the command that repeats it. The
runs that are recorded in the results' files are also searched for loss spikes. Plots are drawn by the commands of the
experiments (--draw).
"""

import argparse
import re
from pathlib import Path

from plots import markdown_table
from shown import EXPERIMENTS, RESULTS, Shown
from spikes import spike_table

from trinity.command_line import HelpFormatter, local_path
from trinity.errors import UserError, run_main
from trinity.io.local import write_atomically

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
TITLE = "Results: the claims, tried in small"
INTRODUCTION = """\
Does a model trained with Trinity do what the report says (arXiv 2602.17004), and what the papers say whose methods it
implements? Each experiment tests one claim on a model that a laptop trains. The design is fixed in the docstring of its
command before the first run, which also names what was added later; it is run once, in full, and reported as it came
out. A figure is the median over three seeds, with the range in brackets. What a small model shows need not hold for a
large one: each docstring says what may matter.

This page is made by `python tools/experiments/gallery.py` from the
[results' files](../tools/experiments/results), which hold settings, versions, seeds and curves. Unless a setup says
otherwise the text is Python's standard library in 14 domains, and the recipe that of
[configs/smoke.yaml](../configs/smoke.yaml) with a smaller model. Words of the tables:

- MaxVio: the load of the fullest expert over the even load, minus 1; 0 is balance. A dead expert gets no token.
- Step of the biases: the root mean square of how much the experts' biases move in a step; reversals: the share of
  experts whose bias moves against its last move, a half if the moves are random.
- SMEBU without clamp: the violation itself in place of its tanh; without momentum: β = 0.
- BatchHet: the largest loss of a step's microbatches minus their mean.
- Largest attention and head logit: before the softmax of the attention, and of the vocabulary."""
SPIKES = """\
The report has no loss spike in three runs. Counted here by the rule of `health.spike` with its defaults (loss or
gradient norm more than 6 standard deviations above the mean of the last 128 ordinary steps, or of half of the steps of
a shorter run; the first half of these raise none), in the recorded runs that have every part of the recipe;
`balancing_rules.py` leaves out the sequence loss. Runs that lack a part are counted in their own section, after 50
steps and with a window of 64. Nano, Mini and Large have not been trained here."""
SPIKE_CAUSES = """\
The runs of one seed of `scaling.py` and its fifth size read the same batches. Of their 24 spikes 11 are at a step at
which another width has one, so they are of the text, not of the recipe; 8 are at steps that only the largest reaches,
so that nothing tells; 5 have no counterpart. Step 459 of seed 2 raises the gradient norm in every width that reaches
it (7 to 11 standard deviations), step 577 of seed 0 too (8 to 10), step 712 (6.5 in both) and step 895 (35 and 61).
The batches of 459, 577 and 712 hold comment lines of 65 slashes (`doctest.py`), that of 895 a list of accented
letters (`shlex.py`). Only one spike of these runs is in the loss, at step 895, and the next step is ordinary. A batch
of 2,048 tokens shows a single line of the text; one of Large has millions of tokens."""
HEAD = """\
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Results</title><style>
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; display: block; margin: 1rem 0; overflow-x: auto; font-size: 0.85rem; }
td, th { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left; }
svg { max-width: 100%; height: auto; background: white; }
code { background: #eee; padding: 0 0.2rem; }
</style>"""


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=local_path, help="the Markdown page (docs/results.md); its links are from docs/")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="also write one HTML file with the plots in it")
    arguments = parser.parse_args()
    if not shown():
        raise UserError(
            f"{RESULTS} has no results; run an experiment in full, and copy the JSON file of its --out there"
        )
    pages = [(arguments.out or PAGE, markdown_page())]
    if arguments.html is not None:
        if arguments.html == pages[0][0]:
            raise UserError(f"--out and --html are one file, {arguments.html}; give two")
        pages.append((arguments.html, html_page()))
    for path, text in pages:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        print(path)


def shown() -> list[Shown]:
    """The experiments whose results are there."""
    return [each for each in EXPERIMENTS if each.path().exists()]


def markdown_page() -> str:
    """The page for docs/."""
    blocks = [f"# {TITLE}", INTRODUCTION, summary()]
    for each in shown():
        facts = [
            f"**{name}.** {text[0].upper()}{text[1:]}"
            for name, text in {
                "Claim": each.claim, "Published": each.published, "Setup": each.setup, "Rule": each.rule,
                "Here": each.outcome(),
            }.items()
        ]  # fmt: skip
        plot = f"![{each.title}]({each.plot})"
        again = f"Repeat: `{each.command}` (the design is in [its docstring](../{each.command.split()[1]}))"
        blocks += [f"## {each.title}", *facts, plot, each.tables(), again]
    return "\n\n".join([*blocks, "## Loss spikes", SPIKES, spike_table(), SPIKE_CAUSES]) + "\n"


def summary() -> str:
    """A table of all experiments, a line each, with links to their sections."""
    rows = [[f"[{each.title}](#{heading_id(each.title)})", each.claim, each.verdict()] for each in shown()]
    missing = [each.title for each in EXPERIMENTS if each not in shown()]
    note = f"\n\nNot run in full yet: {', '.join(missing)}." if missing else ""
    return markdown_table(["experiment", "claim", "here"], rows) + note


def heading_id(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


def html_page() -> str:
    """The same page as one HTML file, with the plots in it.

    Raises:
        UserError: the package markdown is not installed.
    """
    try:
        from markdown import markdown
    except ImportError:
        raise UserError("--html needs the package markdown; install it (pip install -e '.[experiments]')") from None

    def plot(image: re.Match) -> str:
        drawing = (PAGE.parent / image[1]).read_text()
        return drawing[drawing.index("<svg") :]

    settings = {"toc": {"slugify": lambda title, _separator: heading_id(title)}}
    body = markdown(markdown_page(), extensions=["tables", "toc"], extension_configs=settings)
    body = re.sub(r'<img alt="[^"]*" src="([^"]*)" />', plot, body)
    return f"<!doctype html>\n<html lang='en'>\n<head>{HEAD}</head>\n<body>\n{body}\n</body>\n</html>\n"


if __name__ == "__main__":
    run_main(main)
