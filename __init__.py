"""ComfyUI-RoPeSLR as ComfyUI loads it: nothing is imported before comfy_entrypoint is called."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension.

    ComfyUI itself logs only one line of an error, so its traceback is logged here.
    """
    try:
        from .nodes.extension import RoPeSLRExtension

        return RoPeSLRExtension.checked()
    except Exception:
        import logging

        from .nodes.host import cannot_load

        logging.getLogger(__name__).exception(cannot_load())
        raise
