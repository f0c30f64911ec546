"""Made-up images of a known distribution: names, and draws against what the distribution says."""

from __future__ import annotations

import numpy as np
import pytest

from ds_classifier.common.gaussians import GaussianClasses


def test_a_source_and_its_name_are_the_same():
    assert GaussianClasses.parse("gaussians") == GaussianClasses()
    small = GaussianClasses.parse("gaussians:size=16,classes=4")
    assert small == GaussianClasses(size=16, classes=4)
    assert GaussianClasses.parse(str(small)) == small
    assert GaussianClasses.parse("digits") is None
    assert GaussianClasses.parse("/data/gaussians") is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("gaussians:sise=16", "'sise=16'"),
        ("gaussians:size", "'size'"),
        ("gaussians:size=-4", "'size=-4'"),
        ("gaussians:classes=1", "2 to 1,000"),
    ],
)
def test_a_wrong_source_is_refused(source, words):
    with pytest.raises(ValueError, match="need") as error:
        GaussianClasses.parse(source)
    assert words in str(error.value)


def test_draws_have_the_means_and_variances_of_the_distribution():
    """Each coefficient's mean and variance, over 4,000 images, within five standard errors."""
    gaussians = GaussianClasses(classes=2, size=8, channels=2)
    n = 4000
    labels = np.arange(n) % 2
    pixels = gaussians.draw(labels, 3)
    assert pixels.shape == (n, 8, 8, 2)
    images = pixels.transpose(0, 3, 1, 2) / 127.5 - 1
    coefficients = gaussians.transform @ images @ gaussians.transform.T
    rest = coefficients - gaussians.means[labels]
    deviation = np.sqrt(gaussians.variances)
    assert np.abs(rest.mean(0) / deviation).max() < 5 / np.sqrt(n)
    assert np.abs(rest.var(0) / gaussians.variances - 1).max() < 5 * np.sqrt(2 / n)
    assert ((pixels == 0) | (pixels == 255)).mean() < 1e-4
    np.testing.assert_allclose(gaussians.transform @ gaussians.transform.T, np.eye(8), atol=1e-12)


def test_streams_give_other_images_of_the_same_classes():
    gaussians = GaussianClasses(classes=3, size=8, channels=1)
    labels = np.arange(30) % 3
    first = gaussians.draw(labels, 0)
    assert (first == gaussians.draw(labels, 0)).all()
    assert (first != gaussians.draw(labels, 1)).any(axis=(1, 2, 3)).all()
