"""Say what an older DeepSpeed does not have."""

from importlib.metadata import version

import pytest

from ds_classifier.distributed.engine.deepspeed_versions import lacks_nothing

complete_deepspeed = pytest.mark.skipif(
    not lacks_nothing(), reason=f"deepspeed {version('deepspeed')} does not have it"
)
