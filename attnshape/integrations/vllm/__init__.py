"""vLLM: score and credit per policy token out of the serving engine (``README.md`` here).

vLLM finds the entry points below by their groups; the name is ``attnshape`` in all of them. Importing this
module imports no vLLM. A request asks for its attention row with

    PoolingParams(task="classify", use_activation=False, extra_kwargs={"attnshape": True})

and gets its logits and then the row over its tokens, ``[labels + S]`` float32; a row that is refused is
-inf. What other requests get stays as it is, to the bit.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of ``vllm.general_plugins``, called in every process of vLLM.

    Raises:
        RuntimeError: ``VLLM_PLUGINS`` names the plugin, and this vLLM is not one that it knows. Where the
            plugin is not named, a line in the log says so, and nothing else happens.
    """
    from attnshape.integrations.vllm import support

    reason = support.version_refusal()
    if reason is None:
        from attnshape.integrations.vllm.pooler import install

        install()
    else:
        support.refuse(reason)


def io_processor() -> str:
    """Entry point of ``vllm.io_processor_plugins``: the class for ``--io-processor-plugin attnshape``."""
    return "attnshape.integrations.vllm.io_processor.CreditProcessor"
