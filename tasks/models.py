"""The identity of a model's folder as a store knows it.

Earlier versions hashed every file of a folder, so a README or a `generation_config.json` made
another model. What they computed stays valid: a store that has artifacts of a folder under that
digest goes on with it, and notes it as `families/models/<digest>.json`, so that it is found after
such a file has changed.
"""

import json
from contextlib import suppress
from functools import lru_cache
from typing import Any

from qrpo.models import ModelConfig, model_identity
from storage import Store, StoreError
from storage.fingerprints import canonical_json
from tasks.reuse import family_names, noted_family


def known_identity(model: ModelConfig, store: Store, *stages: str) -> dict[str, Any]:
    """`model_identity`, or the identity of earlier versions if the store has rows of one of
    `stages` under it.

    Every file is hashed only where a store has rows of these stages and none under the present
    identity.
    """
    identity = model_identity(model)
    if "digest" not in identity:
        return identity
    key = f"families/models/{identity['digest']}.json"
    if store.exists(key):
        return dict(json.loads(store.read_bytes(key)))
    known = [outside for stage in stages for outside in _outside_inputs(store, stage)]
    if not known or any(identity["digest"] in outside for outside in known):
        return identity
    earlier = model_identity(model, every_file=True)
    if not any(earlier["digest"] in outside for outside in known):
        return identity
    with suppress(StoreError, OSError):  # a plan also works on a store that it cannot write to
        store.write_bytes(key, canonical_json(earlier))
    return earlier


@lru_cache(256)
def _outside_inputs(store: Store, stage: str) -> tuple[str, ...]:
    """What the families of a stage depend on, as JSON."""
    noted = (noted_family(store, stage, family) for family in family_names(store, stage))
    return tuple(json.dumps(family["outside"]) for family in noted if family is not None)
