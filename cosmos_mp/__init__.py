"""cosmos_mp: model-parallel distillation of Cosmos-Transfer1-7B into a student that needs one network call."""

import os
import warnings

__version__ = "0.1.0"

# Clusters run offline; a run that wants the hub says so in its environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# megatron-core warns a dozen times at import about Transformer Engine and apex, which are optional here.
for _word in ("Transformer Engine", "transformer_engine", "Apex", "apex", "TE ", "nvrx", "causal_conv1d", "mamba"):
    warnings.filterwarnings("ignore", message=f".*{_word}.*", category=UserWarning)
# torch 2.13 renames collectives; the old names are in every torch that clusters run. FSDP warns of outputs that are views: nothing changes
# them in place.
warnings.filterwarnings("ignore", message=r".*torch\.distributed.*is deprecated.*_single", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
