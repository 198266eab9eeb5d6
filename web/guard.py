"""Who may ask."""
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from web.api import ApiError


class Guard:
    """ASGI middleware that refuses other sites' pages.

    A site can point a name of its own at this machine (DNS rebinding), and then its pages count
    as ours. So the host that a request names must be an address or localhost.
    """

    def __init__(self, app):
        self.app = app

    def is_ours(self, host):
        """Whether a Host header names this server."""
        try:
            name = urlsplit(f'//{host}').hostname or ''
            return name == 'localhost' or bool(ipaddress.ip_address(name))
        except ValueError:  # neither a name of ours nor an address
            return False

    def check(self, scope):
        """Raise ApiError for a request that is refused."""
        headers = Headers(scope=scope)
        host = headers.get('host', '')
        origin = headers.get('origin')
        if not self.is_ours(host):
            raise ApiError(403, f'this server does not answer to the name {host!r}.',
                           code='forbidden')
        if origin and origin.split('://')[-1] != host:
            raise ApiError(403, f'pages of {origin!r} may not use this server.', code='forbidden')

    async def __call__(self, scope, receive, send):
        app = self.app
        try:
            self.check(scope)
        except ApiError as error:
            app = error.response()
        await app(scope, receive, send)
