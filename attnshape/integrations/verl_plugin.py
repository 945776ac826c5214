"""The entry point of verl's plugins (group ``verl.plugins``): with ``ATTNSHAPE_VERL_GAE=1`` it puts
``attnshape.gae`` in the place of verl's own, without it nothing happens.

verl imports it in every process where attnshape is installed; where plugins are not looked for,
``VERL_USE_EXTERNAL_MODULES=attnshape.integrations.verl_plugin`` has it imported too.
"""

import os

VARIABLE = "ATTNSHAPE_VERL_GAE"

if os.environ.get(VARIABLE, "0") not in ("", "0"):
    from attnshape.integrations.verl import install_gae

    try:
        install_gae()
    except RuntimeError as error:
        # verl swallows every other exception of a plugin, and would go on with its own.
        raise SystemExit(f"{VARIABLE}: {error}") from error
