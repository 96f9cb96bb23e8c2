"""``longswift fidelity``: documents of a text measured one by one, a verdict in words, tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from longswift.core.errors import ConfigError, check_positive, problem
from longswift.core.mechanism import Mechanism
from longswift.eval import fidelity, guarded, options
from longswift.eval import text as text_of
from longswift.eval.cost import counts_keys, remedy
from longswift.eval.models import TINY, load
from longswift.eval.progress import bar
from longswift.eval.results import Progress, Result, writable
from longswift.eval.rivals import FULL, UNIFORM, WINDOW
from longswift.eval.samples import samples
from longswift.extend.rope import check_kind
from longswift.mechanisms.profile import Profile, read_profile

KIND = "fidelity"
# What a reader would not notice, after the divergences that quantised models are accepted with.
GOOD_KL, GOOD_AGREEMENT = 0.02, 0.97
# Density from which on nothing was left out; the rest is rounding of a mean.
_EVERY_KEY = 0.9999
_NOTES = {
    "heads": "queries, keys and values of the dense model (exact) or of the sparse model "
    "(sampled); each layer's output and mass against full attention on the same inputs",
    "ends": "the model reads with the rival in its full-attention layers, real sparse prefill, "
    "errors carried along; next-token distributions against the dense model's",
    "captured": "share of full attention's probability on the keys seen one by one; what is seen "
    "through pooled means is not counted",
    "window": "sliding window whose mean number of keys per query is the measured mechanism's",
    "uniform": "every visible key weighs the same; as many keys picked blindly would capture the "
    "density of the measured mechanism",
    "density": "keys scored over those full attention scores; the choice of keys is not in it",
    "guard": "pairs of a block of queries and a KV head, while the model reads with the measured "
    "mechanism; coverage by the probed rows, 1 for what was computed densely",
}


@dataclass(frozen=True, kw_only=True)
class FidelityRun:
    """What to measure.

    Attributes:
        model: ``tiny``, a directory or a name on the hub.
        file: UTF-8 text; held-out Python documentation by default.
        mechanism: As ``Mechanism.to_dict`` gives it, or ``Profile.to_dict``.
        length: Tokens of a document, or None for what there is, at most 32k.
        documents: How many pieces of the text are measured.
        max_length: Extend the model's positions to this many tokens.
        rope: Scaling of rotary positions for that.
        chunk: Tokens per forward pass.
        exact_below: Longest document the dense model reads; longer ones are judged by samples.
        dtype: Name of a dtype, or ``"auto"``.
        device: Where to run.
        trust_remote_code: Allow the model to bring Python code of its own.
    """

    mechanism: dict[str, Any]
    model: str = TINY
    file: str | None = None
    length: int | None = None
    documents: int = 1
    max_length: int | None = None
    rope: str | None = "yarn"
    chunk: int = 1024
    exact_below: int = fidelity.EXACT_BELOW
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_positive(
            "fidelity", documents=self.documents, chunk=self.chunk, exact_below=self.exact_below
        )
        check_kind(self.rope)


def rival_of(attention: str, settings: Iterable[str], profile: str | None) -> dict[str, Any]:
    """What ``--attention``, ``--set`` and ``--profile`` ask for, JSON-ready.

    Raises:
        ConfigError: Not exactly one mechanism.
        InputError: The file is no profile.
    """
    settings = tuple(settings)
    if profile is not None:
        options.check_unused("--profile", {"--set": settings}, fix=options.CALIBRATE)
        return read_profile(profile).to_dict()
    found = options.mechanisms(attention, settings)
    if len(found) != 1:
        raise ConfigError(
            problem("--attention", expected="one mechanism", got=attention, fix="Pick one of them.")
        )
    return next(iter(found.values())).to_dict()


def _rival(config: dict[str, Any]) -> Mechanism | Profile:
    return Profile.from_dict(config) if "format" in config else options.from_json(config)


def run(
    asked: FidelityRun,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> Result:
    """Measure; documents an interrupted run of the same options has finished are reused.

    Args:
        asked: What to measure.
        output: Where the result goes, or None to keep nothing.
        fresh: Start over.
        progress: Show a bar on stderr.

    Raises:
        InputError: The text is too short, or the profile belongs to another model.
    """
    from longswift.hf.settings import architecture_of

    target = None if output is None else writable(output, kind=KIND)
    mechanism = _rival(asked.mechanism)
    loaded = load(
        asked.model,
        dtype=asked.dtype,
        device=asked.device,
        trust_remote_code=asked.trust_remote_code,
    )
    loaded.extend(asked.max_length, asked.rope)
    if isinstance(mechanism, Profile):
        mechanism.check(architecture_of(loaded.model))
    text = samples(loaded, asked.file, length=asked.length, documents=asked.documents)
    config: dict[str, Any] = json.loads(json.dumps(asdict(asked)))
    config.update(
        file=None if asked.file is None else Path(asked.file).name,
        model=loaded.name,
        length=len(text.documents[0]),
        text_sha256=text.sha256,
        model_sha256=loaded.fingerprint(),
    )
    result = Result(kind=KIND, config=config, seed=0, rows=[])
    kept = Progress(result, target, fresh=fresh, finished=True, records=fidelity.RECORDS)
    with bar(4 * text.tokens, "starting", shown=progress) as step:
        for number, ids in enumerate(text.documents):
            if kept.find(document=number) is not None:
                step(4 * len(ids), "measured before")
                continue
            found = fidelity.measure(
                loaded.model,
                ids,
                mechanism,
                chunk=asked.chunk,
                exact_below=asked.exact_below,
                document=number,
                step=step,
            )
            kept.add(*found.to_rows())
    name = fidelity.name_of(mechanism)
    result.summary.update(summarise(result.rows, name), how=_NOTES)
    result.summary["verdict"] = verdict(result)
    if target is not None:
        result.save(target)
        kept.done()
    return result


def summarise(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Means over documents per rival, and per rival, layer and head; what the guard did."""
    ends = _grouped((row for row in rows if row["part"] == "end"), "name")
    heads = _grouped((row for row in rows if row["part"] == "head"), "name", "layer", "head")
    nll = {key[0]: fmean(r["nll"] for r in group) for key, group in ends.items()}
    whole: dict[str, Any] = {}
    for (rival,), group in ends.items():
        means = {c: _mean(group, c) for c in ("keys_per_query", "density", "kl", "agreement")}
        ratio = math.exp(nll[rival] - nll[FULL]) if FULL in nll else None
        whole[rival] = {
            **means,
            "perplexity": math.exp(nll[rival]),
            "perplexity_ratio": ratio,
        }
    layers = []
    for (rival, layer, head), group in heads.items():
        columns = ("density", "captured_mean", "captured_p10", "error")
        lowest = [r["captured_min"] for r in group if r["captured_min"] is not None]
        layers.append(
            {
                "name": rival,
                "layer": layer,
                "head": head,
                **{column: _mean(group, column) for column in columns},
                "captured_min": min(lowest) if lowest else None,
            }
        )
    return {
        "measured": name,
        "judge": rows[0]["judge"],
        "ends": whole,
        "heads": layers,
        "guard": guarded.summarise(row for row in rows if row["part"] == "guard"),
    }


def _grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Any]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


def _mean(rows: Iterable[dict[str, Any]], column: str) -> float | None:
    values = [row[column] for row in rows if row[column] is not None]
    return fmean(values) if values else None


def verdict(result: Result) -> str:
    """What the figures say, in words."""
    found, said = result.summary, _quality(result)
    guard, own = found["guard"], found["ends"][found["measured"]]
    return said if guard is None else f"{said} {guarded.sentence(guard, own['density'])}"


def _quality(result: Result) -> str:
    found, config = result.summary, result.config
    name, ends = found["measured"], found["ends"]
    own, window = ends[name], ends[WINDOW]
    heads = [h for h in found["heads"] if h["name"] == name and h["captured_mean"] is not None]
    said = f"{name} scores {100 * own['density']:.1f} % of the keys of {config['length']:,} tokens"
    if heads:
        worst = min(heads, key=lambda h: h["captured_mean"])
        said += (
            f" and captures {100 * fmean(h['captured_mean'] for h in heads):.1f} % of the "
            f"attention mass (worst head {100 * worst['captured_mean']:.1f} %, layer "
            f"{worst['layer']}, head {worst['head']})"
        )
    if own["kl"] is None:
        return (
            f"{said}, judged by sampled rows. Perplexity {own['perplexity']:.3f} (a window of "
            f"equal cost {window['perplexity']:.3f}); full attention did not read so long a text."
        )
    said += (
        f". Its next-token distribution differs from full attention's by {own['kl']:.4f} nats (a "
        f"window of equal cost {window['kl']:.4f}, uniform attention {ends[UNIFORM]['kl']:.4f}), "
        f"the likeliest token is the same for {100 * own['agreement']:.1f} % of the positions "
        f"(window {100 * window['agreement']:.1f} %), perplexity is "
        f"{own['perplexity_ratio']:.3f} times full attention's."
    )
    # Probes and dense blocks of a guard are counted beside the keys that were chosen.
    exact = own["density"] > _EVERY_KEY and not guarded.probed(found["guard"])
    if name != FULL and exact and counts_keys(name):
        return (
            f"{said} Every query saw every key: nothing is saved here, and nothing is known about "
            "texts long enough for keys to be left out."
        )
    if own["kl"] <= GOOD_KL and own["agreement"] >= GOOD_AGREEMENT:
        return f"{said} That is close."
    return (
        f"{said} That is a loss (close means at most {GOOD_KL} nats and at least "
        f"{100 * GOOD_AGREEMENT:.0f} %): {remedy(name)}."
    )


def end_table(result: Result) -> text_of.Table:
    """The whole model under every rival."""
    columns = ("", "keys/query", "KL, nats", "same top token", "perplexity", "x full")
    own = result.summary["measured"]
    labels = {FULL: "full attention", WINDOW: "window of equal cost", UNIFORM: "uniform attention"}
    cells = []
    for name in dict.fromkeys((FULL, own, WINDOW, UNIFORM)):
        row = result.summary["ends"].get(name)
        if row is not None:
            cells.append(
                (
                    labels.get(name, name),
                    f"{row['keys_per_query']:,.0f} ({100 * row['density']:.1f} %)",
                    _cell(row["kl"], ".4f"),
                    _percent(row["agreement"]),
                    f"{row['perplexity']:.3f}",
                    _cell(row["perplexity_ratio"], ".4f"),
                )
            )
    config = result.config
    title = f"{config['model']}, {config['documents']} x {config['length']:,} tokens, whole model"
    return text_of.Table(title, columns, cells)


def head_table(result: Result) -> text_of.Table:
    """Single heads, the baselines' figures beside the measured ones."""
    columns = (
        "layer.head",
        "density",
        "captured",
        "p10",
        "min",
        "error",
        "window captured",
        "window error",
        "uniform error",
    )
    found = {(h["name"], h["layer"], h["head"]): h for h in result.summary["heads"]}
    cells = []
    for (name, layer, head), row in found.items():
        if name != result.summary["measured"]:
            continue
        window, uniform = (found[rival, layer, head] for rival in (WINDOW, UNIFORM))
        cells.append(
            (
                f"{layer}.{head}",
                _percent(row["density"]),
                _percent(row["captured_mean"]),
                _percent(row["captured_p10"]),
                _percent(row["captured_min"]),
                _cell(row["error"], ".3f"),
                _percent(window["captured_mean"]),
                _cell(window["error"], ".3f"),
                _cell(uniform["error"], ".3f"),
            )
        )
    basis = {"exact": "every row", "sampled": "sampled rows of the sparse model's layers"}
    return text_of.Table(f"single heads, {basis[result.summary['judge']]}", columns, cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
