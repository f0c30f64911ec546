"""The classifier that several tests of guidance share."""

import pytest
from small_models import DEFAULT, filled

from ds_classifier.model import create_classifier


@pytest.fixture
def classifier():
    model = create_classifier(**DEFAULT)
    model.load_state_dict(filled(model.state_dict()))
    return model.eval().requires_grad_(False)
