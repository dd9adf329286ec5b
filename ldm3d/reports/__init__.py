"""Pages and maps that show a run: `python -m ldm3d.reports {run,latents,registers}`. See README.md."""
