"""What a quantized weight is: families of packed arrays, their layouts and their cost in memory."""

from qjax.arrays.affine import AffineArray as AffineArray
from qjax.arrays.base import GroupedArray as GroupedArray
from qjax.arrays.base import QuantizedArray as QuantizedArray
from qjax.arrays.codebook import CodebookArray as CodebookArray
from qjax.arrays.float_codebook import FloatCodebookArray as FloatCodebookArray
from qjax.arrays.lanes import LaneBlockedArray as LaneBlockedArray
from qjax.arrays.lanes import serves_lanes as serves_lanes
from qjax.arrays.lanes import to_lanes as to_lanes
from qjax.arrays.memory import Memory as Memory
from qjax.arrays.memory import memory as memory
from qjax.arrays.partition import Partitioned as Partitioned
from qjax.arrays.partition import partition as partition
from qjax.arrays.planes import Plane as Plane
from qjax.arrays.raw_blocks import RawBlockArray as RawBlockArray
from qjax.arrays.scaled_float import ScaledFloatArray as ScaledFloatArray
from qjax.arrays.scheme import Scheme as Scheme
from qjax.arrays.scheme import affine as affine
from qjax.arrays.scheme import codes_of as codes_of
from qjax.arrays.scheme import parse_scheme as parse_scheme
from qjax.arrays.transformed import TransformedArray as TransformedArray
from qjax.arrays.two_level import TwoLevelArray as TwoLevelArray
