"""Explanations of each figure and metric in a report."""

from collections.abc import Mapping
from typing import Any

__all__ = ["FIGURES", "MEASURES", "UNKNOWN_FIGURE", "title_and_reading"]

# Name of the file -> title, explanation; in the order of the page.
FIGURES = {
    "reconstructions": (
        "Test images and their reconstructions",
        "Top: test images; below: their reconstructions, decoded from the posterior means. Details that are missing or "
        "blurred are not encoded in the latents. A row of Bernoulli samples, if there is one, shows draws from "
        "p(x | z); its pixels are independent given z, hence the grain.",
    ),
    "prior_samples": (
        "Samples from the prior",
        "Latents drawn from the prior, decoded. If they look like data, the posteriors of the data cover the prior; hybrids "
        "and smears come from regions of the prior with no data.",
    ),
    "samples_by_label": (
        "Samples like a label",
        "Each row is made from images of one label: encode, draw from the posterior, decode. A row with other shapes shows "
        "labels whose latents overlap.",
    ),
    "interpolation": (
        "Interpolation",
        "Top: linear interpolation in latent space; below: in pixel space. The latter only cross-fades the two images; in "
        "a good latent space the images in between are plausible.",
    ),
    "denoising": (
        "Denoising",
        "Pixels are flipped at random, and the image is encoded and decoded. The model was not trained on such noise; the "
        "reconstruction removes the noise, and possibly details.",
    ),
    "tsne": (
        "Latent means in two dimensions, by t-SNE",
        "Each point is an observation, coloured by its label, if any. Training does not use the labels: clusters of one "
        "colour mean that the latents separate the labels without supervision. Neighbourhoods are meaningful; distances "
        "between clusters, and their sizes, are not.",
    ),
    "latent_pairs": (
        "Latent means, two axes at a time",
        "Each point is an observation, on pairs of the axes with the largest variance. Compare with the prior, of standard "
        "deviation 1 on each axis: an axis on which all means are near 0 has little information about the data.",
    ),
    "reconstructions_train": (
        "Training images and reconstructions",
        "As for the test images. If these are clearly better, the model overfits.",
    ),
    "training_curves": ("Training curves", "Redrawn in the page from metrics.jsonl."),
}

# Of a model that is given more than x in training.
_CONDITIONAL = {
    "tsne": "Each point is an observation, coloured by its label if it has one. The model is conditional: latents need not "
    "carry what it is given beside x, the label, say, so colours may mix. Neighbourhoods can be trusted; distances between "
    "islands, and their sizes, cannot.",
}
# Of a model whose prior is not the standard normal, or that has none.
_OTHER_PRIOR = {
    "latent_pairs": "Each point is an observation, seen along the axes that vary most. An axis whose points all lie close "
    "together says little about the data.",
}


def title_and_reading(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """The title of a picture of this name, and how to read it for the model of this config."""
    title, reading = FIGURES.get(name, (name.replace("_", " ").replace("-", " "), UNKNOWN_FIGURE))
    batch, parts = config.get("batch"), config.get("parts")
    if isinstance(batch, dict) and len(batch) > 1:
        reading = _CONDITIONAL.get(name, reading)
    # A run that settings describe has a standard normal; those of earlier versions do not name it.
    prior = parts.get("module.prior") if isinstance(parts, dict) else None if "model" in config else "StandardNormal"
    return title, reading if prior == "StandardNormal" else _OTHER_PRIOR.get(name, reading)


UNKNOWN_FIGURE = "A picture that the run left behind; the script that made it says what it shows."

# Name of a metric -> title, which direction is better, definition (the last two make a sentence).
MEASURES = {
    "neg_elbo": ("-ELBO", "Lower is better: ", "reconstruction + KL, an upper bound on -log p(x)."),
    "reconstruction": (
        "Reconstruction",
        "A part of -ELBO: ",
        "the expected -log p(x | z) under the posterior. For a normal likelihood it includes the density's constant.",
    ),
    "kl": ("KL", "A part of -ELBO: ", "the divergence of the posterior from the prior."),
    "squared_error": ("Squared error", "Lower is better: ", "summed over the elements of x."),
    "mean_squared_error": ("Mean squared error", "Lower is better: ", "per element of x."),
    "log_marginal": (
        "log p(x)",
        "Higher is better: ",
        "by importance sampling; a lower bound in expectation, tighter than the ELBO, which rises with the draws.",
    ),
}
