"""The ops that the model is made of; a call picks the best implementation this machine has (see registry)."""

from blip3o_rt.ops.attention import *
from blip3o_rt.ops.elementwise import *
from blip3o_rt.ops.image import *
from blip3o_rt.ops.linear import *
from blip3o_rt.ops.norm import *
from blip3o_rt.ops.quantized import *
from blip3o_rt.ops.registry import all_ops as all_ops
from blip3o_rt.ops.registry import choices as choices
from blip3o_rt.ops.registry import force as force
from blip3o_rt.ops.registry import recording_usage as recording_usage
from blip3o_rt.ops.registry import used as used
from blip3o_rt.ops.sampling import *
from blip3o_rt.ops.scratch import Scratch as Scratch
