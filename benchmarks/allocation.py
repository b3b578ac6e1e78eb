"""Which rule for choosing bits keeps the picture? Recipes of equal real bytes, trained alike and scored.

    bitsfusion analyze PIPELINE --out ANALYSIS                        # and, for each estimate, --method NAME
    python -m benchmarks.allocation PIPELINE --analysis ANALYSIS --estimates DIR ... --train-data DIR --work WORK

PIPELINE has `prompts.tsv` and `clip/` beside its parts, as examples/shapes exports it; the data is that of its
training. The bytes are those that the paper's rule takes at 2.04 bits a weight over the analysed layers, the
published recipe's average. Arguments that are not known here go to examples/train_bitsfusion.py. What WORK holds
already is not done again. Printed are the ranks of the estimates, a table of all rules with 95 % intervals over the
seeds, and the differences that the claims are about.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import TARGET
from benchmarks.trained import add_sampling_arguments, read_sampling, score, train, unet_bytes, write_json
from diffusers_bitsfusion import Recipe
from diffusers_bitsfusion.analysis.allocate import Totals, allocate
from diffusers_bitsfusion.analysis.results import Analysis
from diffusers_bitsfusion.analysis.statistics import rank_correlations

ETAS = (0.0, 0.1, 0.2, 0.4, 0.5)  # 0.3 is the paper's
RANDOM_RECIPES = 5
MOST_BITS = 4  # of a layer of a random recipe

PAPER, KNAPSACK = "paper's rule", "knapsack"
PAPER_BY_PSNR, KNAPSACK_BY_PSNR = f"{PAPER}, by PSNR", f"{KNAPSACK}, by PSNR"
BESIDE = {"uniform 2": ("--recipe", "2"), "uniform 2, four levels": ("--recipe", "2", "--no_balance")}
FIGURES = ("score", "CLIP score", "PSNR, dB", "MSE × 1000")


def make_recipes(analysis: Analysis, estimates: Mapping[str, Analysis]) -> dict[str, Recipe]:
    """Recipes of the same bytes, by name of the rule that finds them."""
    over_layers = TARGET * sum(analysis.sizes.values())
    target = (over_layers + analysis.header.fixed_bits) / analysis.header.weights
    paper = allocate(analysis, target, rule="paper")
    budget = Totals.of(paper, analysis).bytes
    recipes = {f"random {seed}": random_recipe(analysis, budget, seed) for seed in range(RANDOM_RECIPES)}
    recipes["data-free"] = allocate(analysis, max_bytes=budget, rule="data-free")
    recipes[PAPER] = paper
    recipes[KNAPSACK] = allocate(analysis, max_bytes=budget)
    by_psnr = analysis.by("psnr")
    recipes[PAPER_BY_PSNR] = allocate(by_psnr, max_bytes=budget, rule="paper")
    recipes[KNAPSACK_BY_PSNR] = allocate(by_psnr, max_bytes=budget)
    recipes |= {f"{KNAPSACK}, {name} estimate": allocate(other, max_bytes=budget) for name, other in estimates.items()}
    for eta in ETAS:
        recipes[f"{PAPER}, η = {eta}"] = allocate(analysis, max_bytes=budget, rule="paper", eta=eta)
    return recipes


def random_recipe(analysis: Analysis, budget: int, seed: int) -> Recipe:
    """1 to 4 bits a layer: bits go to layers in random order, one each time, while they fit the budget in bytes."""
    rng = np.random.default_rng(seed)
    layers = analysis.header.layers
    bits = dict.fromkeys(layers, 1)
    spent = sum(layer.bytes[0] for layer in layers.values())
    steps = np.repeat(list(layers), MOST_BITS - 1)
    for name in rng.permutation(steps).tolist():
        more = layers[name].bytes[bits[name]] - layers[name].bytes[bits[name] - 1]
        if spent + more <= budget:
            bits[name], spent = bits[name] + 1, spent + more
    return Recipe(bits, source=f"random, seed {seed}", shapes=analysis.shapes)


def train_rule(args: argparse.Namespace, rule: str, switches: tuple[str, ...], seed: int) -> Path:
    """The folder of the pipeline, trained by Stage I and packed."""
    out = args.work / f"{rule}, seed {seed}"
    options = {
        "stage": 1,
        "max_train_steps": args.steps,
        "train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": seed,
    }
    train(args.pipeline, args.train_data, out, options, [*args.train_arguments, *switches])
    return out


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of `bitsfusion evaluate`, with the bytes of the UNet's file."""
    file = folder / "report.json"
    if not file.exists():
        report = score(args.pipeline, folder, args.num_images, args.work / "images", sampling=read_sampling(args))
        write_json(file, report | {"unet_bytes": unet_bytes(folder)})
    return json.loads(file.read_text())


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    values = report["compositional"]["overall"], report["clip_score"], report["psnr"], 1000 * report["mse"]
    return dict(zip(FIGURES, values, strict=True))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (n,) values and the bounds of its 95 % interval by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def text(values: np.ndarray) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def table(reports: Mapping[str, list[dict[str, Any]]], totals: Mapping[str, Totals]) -> str:
    """One row a rule: bits, bytes, and the figures' means over the seeds with intervals."""
    lines = [f"| {' | '.join(['', 'bits over layers', 'UNet file, kB', *FIGURES])} |", "|---" * 7 + "|"]
    for rule, of_seeds in reports.items():
        bits = f"{totals[rule].layer_bits:.3f}" if rule in totals else ""
        size = np.mean([report["unet_bytes"] for report in of_seeds]) / 1000
        columns = [[figures(report)[name] for report in of_seeds] for name in FIGURES]
        lines.append(f"| {rule} | {bits} | {size:.1f} | {' | '.join(text(np.array(column)) for column in columns)} |")
    return "\n".join(lines)


def differences(reports: Mapping[str, list[dict[str, Any]]]) -> str:
    """What the claims are about: differences of rules, paired by seed, and against the random recipes' spread."""

    def scores(rule: str) -> np.ndarray:
        return np.array([[figures(report)[name] for name in FIGURES] for report in reports[rule]])

    pairs = [(PAPER, "uniform 2, four levels"), (KNAPSACK, PAPER), (KNAPSACK, "data-free"), (PAPER, "data-free")]
    pairs += [(KNAPSACK_BY_PSNR, KNAPSACK), (KNAPSACK, "uniform 2")]
    lines = [f"| {' | '.join(['difference', *FIGURES])} |", "|---" * 5 + "|"]
    for better, worse in pairs:
        if better in reports and worse in reports:
            columns = (scores(better) - scores(worse)).T
            lines.append(f"| {better} − {worse} | {' | '.join(map(text, columns))} |")
    randoms = [scores(rule).mean(axis=0) for rule in reports if rule.startswith("random ")]
    for rule in (PAPER, KNAPSACK):
        if rule in reports and len(randoms) > 1:
            gain = scores(rule).mean(axis=0) - np.mean(randoms, axis=0)
            cells = [f"{x:.3f} (spread {s:.3f})" for x, s in zip(gain, np.std(randoms, axis=0, ddof=1), strict=True)]
            lines.append(f"| {rule} − mean of {len(randoms)} random recipes | {' | '.join(cells)} |")
    return "\n".join(lines)


def ranks(analysis: Analysis, estimates: Mapping[str, Analysis]) -> str:
    """Spearman's correlation of every estimate's sensitivity with the full analysis', by MSE and by PSNR."""
    lines = ["| | by | n = 1 | n = 2 | n = 3 | all |", "|---" * 6 + "|"]
    for name, other in estimates.items():
        for metric in ("mse", "psnr"):
            second = other.by(metric) if metric in other.header.metrics else other
            values = rank_correlations(analysis.by(metric), second).values()
            lines.append(f"| {name} | {metric} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and score recipes of equal bytes.")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--analysis", type=Path, required=True, help="folder of the full analysis")
    parser.add_argument(
        "--estimates", type=Path, nargs="*", default=[], help="folders of other analyses, such as a second full one"
    )
    parser.add_argument("--train-data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps recipes, pipelines, pictures and reports")
    parser.add_argument("--only", nargs="+", metavar="RULE", help="of the table's rows; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    add_sampling_arguments(parser)
    args, args.train_arguments = parser.parse_known_args()

    analysis = Analysis.load(args.analysis)
    others = [Analysis.load(folder) for folder in args.estimates]
    print(ranks(analysis, {folder.name: other for folder, other in zip(args.estimates, others, strict=True)}), "\n")
    recipes = make_recipes(analysis, {other.header.method: other for other in others if other.header.method != "full"})
    args.work.mkdir(parents=True, exist_ok=True)
    switches: dict[str, tuple[str, ...]] = {}
    for rule, recipe in recipes.items():
        recipe.save(args.work / f"{rule}.json")
        switches[rule] = ("--recipe", str(args.work / f"{rule}.json"))
    switches |= BESIDE
    reports: dict[str, list[dict[str, Any]]] = {rule: [] for rule in args.only or switches}
    for seed in args.seeds:
        for rule, of_seeds in reports.items():
            of_seeds.append(measure(args, train_rule(args, rule, switches[rule], seed)))
    totals = {rule: Totals.of(recipe, analysis) for rule, recipe in recipes.items()}
    print(table(reports, totals), end="\n\n")
    print(differences(reports))


if __name__ == "__main__":
    main()
