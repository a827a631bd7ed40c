"""SoME layers: frozen random experts, and a key store that learns by rule which token goes where."""

from modeling.config import SoMEConfig
from modeling.key_rules import KeyRules
from modeling.lazy import lazy_names

__getattr__, _lazy = lazy_names(
    __name__,
    {
        "experts": ["FrozenExpertPool", "pool_manifest"],
        "keys": ["KeyStore", "KeyStoreUpdate", "update_key_stores"],
        "layer": ["SoMELayer"],
        "router": ["Routing"],
        "statistics": ["KeyStatistics"],
    },
)
__all__ = ["KeyRules", "SoMEConfig", *_lazy]
