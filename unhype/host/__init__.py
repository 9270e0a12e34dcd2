"""The only code that touches ComfyUI. Import the module you need: this one stays light."""
