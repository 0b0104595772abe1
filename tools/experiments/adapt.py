"""Compare ways to adapt a model to a domain: replay, Spectrum, merging back, merges of models, searched merges, DAM.

python tools/experiments/adapt.py --out runs/adapt
python tools/experiments/adapt.py --quick --out runs/adapt-quick
python tools/experiments/adapt.py --draw tools/experiments/results/adapt.json

The papers' claims:
- SEC (arXiv 2406.14971): continued pretraining with 5 % of general text learns the domain, and a TIES merge with the
  model that it started from restores general abilities.
- Spectrum (2406.06623): to train the 25 or 50 % of the modules of each type with the largest signal-to-noise ratio is
  as good as to train all, with less memory and time: 30 to 42 % more efficient with about half of the weights frozen.
- DAM (2410.08371): learned coefficients are as good as evolutionary search at less cost; a mean competes where models
  are similar.

The design, fixed before the first run:
- Text (see adapt_texts.py), on every machine with CPython: `general`, modules of the standard library and their
  docstrings; `manual`, chapters of the language reference, a near domain; `unicode`, the Unicode character database, a
  far one. The tokenizer is trained on general text. Merges are searched on `search`, DAM learns on `train`, and all
  models are compared on `test`: three different sets of modules, chapters and blocks of characters.
- Loss: nats per byte, of 160 rows of 128 tokens of each `test`, and in searches of 32 rows of each `search`.
- Model: Trinity, 0.76 million parameters: 9 layers, the first dense, the others with 8 experts of which 2 are active,
  d 64, vocabulary 1024. Muon and AdamW. The seed draws weights, order of text, random modules, DARE's masks, searches.
- `base`: 600 steps of 12 rows of general text; the rate decays to 0 from half on.
- Continuation on each domain: 80 steps with a fresh optimizer, a quarter of the base's peak rates, warm-up over a
  tenth, decay to 0 from half on. Everything is trained: without replay, and with 12.5 % of general text. And with
  replay, some modules: 25 and 50 % of each type by the score `mp`, by the script's score `spectrum`, and at random, as
  many of each type as by `mp`; embedding and head always.
- Merge back of the base and each of the four models of which all was trained: the mean; TIES, density 0.5; base + α·δ
  with α searched (24 trials at most), and with an α each for attention, experts, router and rest (60 trials). The sum
  of the domain's and the general loss is minimised.
- Merges of the two models with replay. Without data: mean, mean of three with the base, SLERP, task arithmetic with
  weights 1, TIES with density 0.5, DARE-TIES with weights and density 0.5. Searched: task arithmetic with a weight
  from 0 to 1 for each model and part, 200 trials of CMA-ES. Learned: DAM of all linear layers, embeddings and gains,
  of the two models, and of these and the base; 800 rows of each source, 200 steps, otherwise its defaults.
- Measured: loss of each domain and their sum; trials or steps; CPU seconds of one thread; bytes of gradients and
  optimizer state; and CPU seconds of a training step for each choice of modules, 12 steps of each in turns.
- Added after the run had begun: a claim holds here if TIES leaves half or less of what was forgotten; if half of the
  modules, by `mp`, learn at least 90 % of what all learn; if DAM's sum of losses is no higher than the search's, at
  less cost. Added after the results were known: and if modules by `mp` learn more than random ones.

Differences from the papers that may matter: a model of 0.76 million parameters that has seen 0.9 million tokens has not
converged, so any text may still improve it on all; a continuation has 13 % of the base's steps, and more replay than
the 5 % of SEC; SEC merges with an instruct model; Spectrum is measured on fine-tuning of models of billions.

Finished parts are kept in --out: after an interruption the same command continues with the next part. A part that was
interrupted begins anew. Results so far are written after every seed.
"""

from experiment import Experiment, run_experiment

from trinity.errors import run_main


def experiment() -> Experiment:
    """The experiment."""
    from adapt_parts import PARTS
    from adapt_report import draw, outcome, report
    from adapt_texts import describe, make_texts
    from adapt_train import FULL, QUICK

    assert __doc__ is not None
    return Experiment(
        name="adapt",
        design=__doc__,
        claim="A model continued on a domain and merged back keeps its general abilities; the modules with the largest "
        "signal-to-noise ratio suffice; learned merges are as good as searched ones.",
        full=FULL,
        quick=QUICK,
        make_texts=lambda out, size: make_texts(out / f"texts-{size.vocabulary}", size.vocabulary, size.every),
        describe_texts=describe,
        parts=lambda _size, _seed: PARTS,
        report=report,
        outcome=outcome,
        draw=draw,
        packages=("torch", "numpy", "tokenizers", "cma"),
        unit="part",
    )


def main() -> int | None:
    """The command."""
    return run_experiment(experiment())


if __name__ == "__main__":
    run_main(main)
