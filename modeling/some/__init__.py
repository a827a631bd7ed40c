"""SoME layers: frozen random experts, and a key store that learns by rule which token goes where."""

from modeling.config import SoMEConfig
from modeling.key_rules import KeyRules
from modeling.some.experts import FrozenExpertPool, pool_manifest
from modeling.some.keys import KeyStore, KeyStoreUpdate, update_key_stores
from modeling.some.layer import SoMELayer
from modeling.some.router import Routing
from modeling.some.statistics import KeyStatistics

__all__ = [
    "FrozenExpertPool",
    "KeyRules",
    "KeyStatistics",
    "KeyStore",
    "KeyStoreUpdate",
    "Routing",
    "SoMEConfig",
    "SoMELayer",
    "pool_manifest",
    "update_key_stores",
]
