"""The decoder as pure functions: config, params, cache, forward; loading, tensor by tensor."""

from qjax.models.cache import CacheKind as CacheKind
from qjax.models.cache import KVCache as KVCache
from qjax.models.cache import init_cache as init_cache
from qjax.models.config import ModelConfig as ModelConfig
from qjax.models.forward import forward as forward
from qjax.models.load import load_gguf as load_gguf
