"""GGUF: the container read by memory map, its blocks as packed arrays, and both written back."""

from qjax.formats.gguf.arrays import from_blocks as from_blocks
from qjax.formats.gguf.arrays import to_blocks as to_blocks
from qjax.formats.gguf.arrays import type_of as type_of
from qjax.formats.gguf.container import GGUFFile as GGUFFile
from qjax.formats.gguf.container import open_gguf as open_gguf
