"""Recalibrate a merged folder: expert biases (balance.py), and routers if wanted (fit_routers.py), on given texts.

The new tensors are written into the folder's files, and texts, rule and figures into recalibration.json beside them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trinity.config.run import BalancingConfig
from trinity.data.tokenizer.tokenizer import fingerprint
from trinity.errors import UserError
from trinity.evaluation.expert_load import moe_layers
from trinity.interop.weight_map import weight_map
from trinity.io.json_files import write_json
from trinity.merging.balance import ROWS, Rows, Rule, read_rows, settle_biases
from trinity.merging.fit_routers import Fitted, fit_routers, router_logits
from trinity.merging.load_model import load_model
from trinity.merging.plan import Plan
from trinity.merging.rewrite import rewrite_tensors
from trinity.merging.sources import FolderSource, Source
from trinity.merging.validation import RowSettings, ValidationSets
from trinity.models.trinity import Trinity
from trinity.run_directory import newest_config

RECALIBRATION = "recalibration.json"
"""In the merged folder: the texts, and the figures before and after."""


class Recalibration:
    """What is recalibrated on which texts.

    Args:
        plan: of the merge.
        given: shards or text files, or MODEL=TEXT with a model of the recipe.
        routers: also fit the routers, each text to its model.
        rule: that moves the biases; None: that of the run that gives the config, else SMEBU.
        settings: of the rows; without a number of rows, ROWS of each text.
        progress: show progress on stderr.
    Raises:
        UserError: a text is given twice, or for a model that the recipe does not have.
    """

    def __init__(
        self,
        plan: Plan,
        given: Sequence[str],
        routers: bool,
        rule: Rule | None,
        settings: RowSettings,
        progress: bool = False,
    ) -> None:
        self._plan, self._routers, self._rule, self._progress = plan, routers, rule, progress
        self._texts = _texts(given, plan)
        self._sets = ValidationSets({text: text for text in self._texts}, "--recalibrate")
        self._settings = replace(settings, rows=settings.rows or ROWS)

    def check(self) -> None:
        """Refuse, before the merge, what cannot be recalibrated.

        Raises:
            UserError: naming it.
        """
        if self._texts and all(self._plan.dense):
            raise UserError(
                f"{self._plan.donor.label} has no MoE layers, so no biases to recalibrate; omit --recalibrate"
            )
        if self._routers:
            self._check_routers()
        if self._texts:
            self._sets.check(self._plan)

    def run(self, folder: Path) -> list[str]:
        """Recalibrate a folder, in its files; returns lines for the user."""
        source = FolderSource(str(folder), folder)
        model = load_model(source).to(self._settings.device)
        texts = {text: self._rows(text, source, model) for text in self._texts}
        batches = [rows for each in texts.values() for rows in each]
        before = self._sets.figures(model, source, self._settings)
        config = _balancing(self._plan, self._rule)
        passes, fitted = settle_biases(model, batches, config, self._progress).passes, None
        if self._routers:
            # routers first see what the balanced model computes; then the biases follow the new routers
            fitted = self._fit(model, texts)
            passes += settle_biases(model, batches, config, self._progress).passes
        after = self._sets.figures(model, source, self._settings)
        count, biases = rewrite_tensors(folder, _routing_tensors(model, self._routers)), len(moe_layers(model))
        record = {
            "texts": self._texts,
            "rule": config.kind,
            "passes": passes,
            "before": {text: each.metrics for text, each in before.items()},
            "after": {text: each.metrics for text, each in after.items()},
            "routers": None if fitted is None else fitted._asdict(),
        }
        write_json(folder / RECALIBRATION, record)
        return [
            f"recalibrated by {config.kind} in {passes} passes: {count} tensors rewritten, {biases} expert biases and "
            f"{count - biases} routers; all others as merged",
            *(f"{title}: {a} before, {b} after" for title, (a, b) in before_and_after(record).items()),
        ]

    def _check_routers(self) -> None:
        plan = self._plan
        if not self._texts:
            raise UserError("--recalibrate-routers needs texts; give --recalibrate MODEL=TEXT for each model")
        for text, label in self._texts.items():
            if label is None:
                raise UserError(
                    f"--recalibrate-routers needs to know whose routing {text} shall have; write --recalibrate "
                    f"MODEL={text} with one of {', '.join(plan.sources)}"
                )
            own = plan.sources[label].tokenizer or plan.vocabulary.donor.tokenizer
            donor = plan.vocabulary.donor.tokenizer
            if plan.vocabulary.tokenizer_json is not None or (donor and own and fingerprint(own) != fingerprint(donor)):
                raise UserError(f"--recalibrate-routers needs one tokenizer, and that of {label} is another; omit it")
        if plan.recipe.has_layers or plan.recipe.match_experts:
            raise UserError(
                "--recalibrate-routers needs models whose layers and experts are those of the merged one, and the "
                "recipe has slices or match_experts; omit it"
            )

    def _rows(self, text: str, source: Source, model: Trinity) -> list[Rows]:
        assert source.tokenizer is not None
        documents = self._sets.documents(text, source.tokenizer, model.config.vocab_size)
        settings = self._settings
        assert settings.rows is not None
        return read_rows(documents, settings.row_tokens(model), settings.rows, settings.batch_tokens, settings.device)

    def _fit(self, model: Trinity, texts: dict[str, list[Rows]]) -> Fitted:
        """Fit the routers; the merged model waits on the CPU while another one computes."""
        device = self._settings.device
        model.to("cpu")
        logits = []
        for text, batches in texts.items():
            label = self._texts[text]
            assert label is not None
            logits.append(router_logits(load_model(self._plan.sources[label]).to(device), batches))
        model.to(device)
        batches = [rows for each in texts.values() for rows in each]
        return fit_routers(model, batches, [torch.cat(parts) for parts in zip(*logits)], self._progress)


def before_and_after(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Title → values before and after, of the content of recalibration.json."""
    titles = {"loss": "loss", "max_violation_mean": "MaxVio, mean of the layers",
              "max_violation": "MaxVio, worst layer", "dead_experts": "dead experts"}  # fmt: skip
    pairs = {
        f"{text}: {title}": (record["before"][text][key], record["after"][text][key])
        for text in record["texts"]
        for key, title in titles.items()
    }
    if record["routers"] is not None:
        title = "routers: mean squared difference of the scores from the models' own"
        pairs[title] = record["routers"]["before"], record["routers"]["after"]
    return {title: (f"{before:.6g}", f"{after:.6g}") for title, (before, after) in pairs.items()}


def _texts(given: Sequence[str], plan: Plan) -> dict[str, str | None]:
    """Text → label of its model, or None, of the --recalibrate arguments.

    Raises:
        UserError: a text is given twice, or for a model that the recipe does not have.
    """
    found: dict[str, str | None] = {}
    for each in given:
        label = next((label for label in plan.sources if each.startswith(f"{label}=")), None)
        text = each if label is None else each.removeprefix(f"{label}=")
        name, equals, _ = text.partition("=")
        if label is None and equals and not Path(text).exists():
            raise UserError(f"--recalibrate {each}: {name} is none of the models; they are {', '.join(plan.sources)}")
        if text in found:
            raise UserError(f"--recalibrate names {text} twice; give each text once")
        found[text] = label
    return found


def _balancing(plan: Plan, rule: Rule | None) -> BalancingConfig:
    """The rule that moves the biases, with the constants of the run that gives the config, if it is a run."""
    config = BalancingConfig() if plan.donor.files is not None else newest_config(plan.donor.folder).balancing
    return replace(config, kind=rule or ("smebu" if config.kind == "none" else config.kind))


def _routing_tensors(model: Trinity, routers: bool) -> dict[str, Any]:
    """Name on disk → value of the expert biases, and of the routers."""
    endings = (".expert_bias", ".router.weight") if routers else (".expert_bias",)
    state = model.state_dict()
    return {name: state[parameter] for name, parameter, _ in weight_map(model.config) if parameter.endswith(endings)}
