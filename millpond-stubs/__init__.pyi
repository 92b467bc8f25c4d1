from producers.blocking import BlockingClient as BlockingClient
from producers.client import Client as Client
from producers.invalidation import Invalidation as Invalidation
from producers.reply import Reply as Reply
from producers.store import Found as Found
from producers.store import Info as Info
from shared.errors import ComputeError as ComputeError
from shared.errors import ConfigError as ConfigError
from shared.errors import ContentFiltered as ContentFiltered
from shared.errors import DeadlineExceeded as DeadlineExceeded
from shared.errors import InvalidRequest as InvalidRequest
from shared.errors import MillpondError as MillpondError
from shared.errors import NotCached as NotCached
from shared.errors import Overloaded as Overloaded
from shared.errors import Poisoned as Poisoned
from shared.errors import ProviderError as ProviderError
from shared.errors import ProviderTimeout as ProviderTimeout
from shared.errors import ProviderUnreachable as ProviderUnreachable
from shared.errors import RateLimited as RateLimited
from shared.errors import Superseded as Superseded
from shared.errors import Unavailable as Unavailable
from shared.settings import Settings as Settings

__version__: str

def main() -> None: ...
