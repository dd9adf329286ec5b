"""What the server of hostile.py imports once: everything that is slow to load or to use for the first time.

A process that is forked from the server needs a tenth of a second for a run, instead of two seconds.
"""

import contextlib
import io

import hostile  # noqa: F401
import numpy as np
import torch._dynamo

import sample  # noqa: F401
import train_cdal
import train_ldm
import train_vae
from ldm3d.config import InputError
from ldm3d.engine.logger import new_figure

torch.set_num_threads(1)
for script in (train_vae, train_ldm, train_cdal):  # the help of every setting is read from the source
    with contextlib.suppress(InputError):
        script.main(["none.json"])
if figure := new_figure():
    figure.subplots().imshow(np.zeros((2, 2)))
    figure.canvas.print_png(io.BytesIO())
