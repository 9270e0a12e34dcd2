"""UnHype for ComfyUI: prompt-conditioned LoRA from a hypernetwork, for concept erasure."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    # Imported here, not above: the file must stay importable without ComfyUI (pytest imports it).
    from .nodes import UnHypeExtension

    return UnHypeExtension()
