"""The table of iwae_mnist.py: the result of each model, with that of the paper."""

from pathlib import Path

from pyro_vae._files import read_json
from pyro_vae.runs.folder import write_json
from pyro_vae.training.schedules import STAGES

# Table 1 of the paper, one stochastic layer, binarised MNIST: -log p(test) in nats.
PAPER = {"vae-1": 86.76, "vae-5": 86.47, "vae-50": 86.35, "iwae-1": 86.76, "iwae-5": 85.54, "iwae-50": 84.78}


def write_table(out: Path) -> str:
    """Markdown and JSON of all models measured in this folder, by this command or an earlier one; returns the Markdown."""
    rows = {name: read_json(path) for name in PAPER if (path := out / name / "estimates.json").is_file()}
    lines = [
        "-log p(test) in nats per image by importance sampling, ± its standard error, after the given number of stages; the "
        "paper has all 8, 3,280 epochs, and 5,000 draws per image.",
        "",
        "| model | k | stages | epochs | -ELBO | draws | -log p | paper's -log p | active units of 50 | training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        model, k = name.split("-")
        nll, elbo = row["log_marginal"], row["neg_elbo"]
        cells = [
            f"{model.upper()} | {k} | {row['stages']} of {STAGES} | {row['epochs']:,}",
            f"{elbo['value']:.2f} ± {elbo['standard_error']:.3f}",
            f"{row['importance_samples']:,} | {-nll['value']:.2f} ± {nll['standard_error']:.3f} | {row['paper'] or ''}",
            f"{row['active_units']} | {row['training_seconds'] / 60:.0f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "vae-1" in rows and "iwae-1" not in rows:
        lines += ["", "IWAE with k = 1 is the VAE with k = 1."]
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    write_json(out / "table.json", rows)
    return text
