"""Published update rules, each a few lines in a file of its own: ``fusedopt.rules.Lion(params, lr=1e-4)``.

Classes take what their authors' code takes, with the defaults of that code or of the paper, and `Optimizer`'s options.
`Cautious`, `Centralize` and `GrokFast` change an optimizer that there is. The callbacks that each is made of are here
too, for lists of one's own. docs/rules_table.md says what each costs; docstrings are as in `fusedopt.callbacks`.
"""

from .adabelief import AdaBelief, adabelief_step, average_sqr_surprise
from .adabound import AdaBound, adabound_step
from .adafactor import Adafactor, adafactor_step
from .adammini import AdamMini, adam_mini_step
from .adamod import AdaMod, adamod_step
from .adamp import AdamP, adamp_step
from .adan import Adan, adan_step
from .ademamix import AdEMAMix, ademamix_step
from .adopt import ADOPT, adopt_step
from .came import CAME, came_step
from .cautious import Cautious, cautious, cautious_step
from .centralize import Centralize, centralize
from .dadaptadam import DAdaptAdam, dadapt_adam_step
from .dog import DoG, dog_step
from .first import first_step
from .grokfast import GrokFast, grokfast_filter
from .laprop import LaProp, laprop_step
from .lars import LARS, lars_step
from .ldog import LDoG, ldog_step
from .lion import Lion, lion_step
from .mars import MARS, mars_step
from .muon import Muon, muon_step
from .novograd import NovoGrad, novograd_step
from .prodigy import Prodigy, prodigy_step
from .qhm import QHM, qhm_step
from .schedulefree import (
    AdamWScheduleFree,
    SGDScheduleFree,
    divide_by_rms,
    schedule_free_step,
)
from .sgdp import SGDP, sgdp_step
from .shampoo import Shampoo, shampoo_step
from .signum import Signum, sign_step
from .sm3 import SM3, sm3_step
from .soap import SOAP, soap_step
from .sophia import SophiaG, sophia_step
from .stableadamw import StableAdamW, stable_adamw_step
from .tiger import Tiger
from .yogi import Yogi, average_sqr_yogi

__all__ = [
    "ADOPT",
    "CAME",
    "LARS",
    "MARS",
    "QHM",
    "SGDP",
    "SM3",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaBound",
    "AdaMod",
    "Adafactor",
    "AdamMini",
    "AdamP",
    "AdamWScheduleFree",
    "Adan",
    "Cautious",
    "Centralize",
    "DAdaptAdam",
    "DoG",
    "GrokFast",
    "LDoG",
    "LaProp",
    "Lion",
    "Muon",
    "NovoGrad",
    "Prodigy",
    "SGDScheduleFree",
    "Shampoo",
    "Signum",
    "SophiaG",
    "StableAdamW",
    "Tiger",
    "Yogi",
    "adabelief_step",
    "adabound_step",
    "adafactor_step",
    "adam_mini_step",
    "adamod_step",
    "adamp_step",
    "adan_step",
    "ademamix_step",
    "adopt_step",
    "average_sqr_surprise",
    "average_sqr_yogi",
    "came_step",
    "cautious",
    "cautious_step",
    "centralize",
    "dadapt_adam_step",
    "divide_by_rms",
    "dog_step",
    "first_step",
    "grokfast_filter",
    "laprop_step",
    "lars_step",
    "ldog_step",
    "lion_step",
    "mars_step",
    "muon_step",
    "novograd_step",
    "prodigy_step",
    "qhm_step",
    "schedule_free_step",
    "sgdp_step",
    "shampoo_step",
    "sign_step",
    "sm3_step",
    "soap_step",
    "sophia_step",
    "stable_adamw_step",
]
