"""What a report says of each picture and figure: how to read it, in a sentence or two."""

from collections.abc import Mapping
from typing import Any

__all__ = ["FIGURES", "MEASURES", "UNKNOWN_FIGURE", "title_and_reading"]

# Name of the file -> title, how to read it; in the order in which a page shows them.
FIGURES = {
    "reconstructions": (
        "Test images and their reconstructions",
        "Top: images the model has not seen; below: what the decoder makes of their latent means. What is lost from one row "
        "to the next is what the latents did not carry: look for what is gone or blurred. Where there is a row "
        "of Bernoulli samples, it shows what the model says a real image looks like, pixel by pixel on its own, hence the "
        "grain.",
    ),
    "prior_samples": (
        "Drawn from the prior",
        "Latents drawn at random, decoded: what the model makes up by itself. Where they look like data, the codes of real "
        "images fill the prior; hybrids and smears come from gaps that no image's code covers.",
    ),
    "samples_by_label": (
        "Samples like a label",
        "Each row starts from images of one label: encode one, draw from its posterior, decode. A row that strays into "
        "other shapes shows labels whose codes overlap.",
    ),
    "interpolation": (
        "From one image to another",
        "Top: a straight way in latent space; below: the same way in pixels. Cross-fading two images is no model of what "
        "lies between them: a good latent space passes through plausible images instead.",
    ),
    "denoising": (
        "Denoising",
        "Pixels are flipped at random, then the image is encoded and decoded. The model knows no such noise, so it answers "
        "with the nearest image it can make: noise goes, and so may details.",
    ),
    "tsne": (
        "Latent means in two dimensions, by t-SNE",
        "Each point is an observation, coloured by its label if it has one, which the training never saw: islands of one "
        "colour mean that the latents found the labels by themselves. Neighbourhoods can be trusted; distances between "
        "islands, and their sizes, cannot.",
    ),
    "latent_pairs": (
        "Latent means, two axes at a time",
        "Each point is an observation, seen along the axes that vary most. Compare with the prior, a round cloud of "
        "standard deviation 1: an axis whose points all lie near 0 says little about the data.",
    ),
    "reconstructions_train": (
        "Training images and reconstructions",
        "As for the test images. Where these look clearly better than those, the model has learned its training set by "
        "heart.",
    ),
    "training_curves": ("Training curves", "Drawn anew in the page from metrics.jsonl."),
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

# Name of a figure -> title, which way is better, what it is (the last two make a sentence).
MEASURES = {
    "neg_elbo": ("-ELBO", "Lower is better: ", "reconstruction + KL, an upper bound on -log p(x)."),
    "reconstruction": (
        "Reconstruction",
        "A part of -ELBO: ",
        "-log p(x | z) at latents of the data, what the decoder still gets wrong. Of a normal likelihood it holds the "
        "density's constant.",
    ),
    "kl": ("KL", "A part of -ELBO: ", "how far the latents are from the prior, the nats that they say about the data."),
    "squared_error": ("Squared error", "Lower is better: ", "summed over the elements of x."),
    "mean_squared_error": ("Mean squared error", "Lower is better: ", "per element of x."),
    "log_marginal": (
        "log p(x)",
        "Higher is better: ",
        "by importance sampling; a lower bound in expectation, tighter than the ELBO, and rising with the draws.",
    ),
}
