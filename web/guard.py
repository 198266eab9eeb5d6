"""Who may ask: no page of another site, and nobody without the API key."""
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from web.api import ApiError


class Guard:
    """ASGI middleware that refuses other sites' pages, and whoever lacks the API key.

    A site can point a name of its own at this machine (DNS rebinding), and then its pages count
    as ours. So the host that a request names must be an address, localhost or an allowed name.
    """

    def __init__(self, app, allow_host, key):
        self.app = app
        self.names = {'localhost', *allow_host.lower().replace(',', ' ').split()}
        self.key = key.encode()

    def is_ours(self, host):
        """Whether a Host header names this server."""
        try:
            name = urlsplit(f'//{host}').hostname or ''
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:  # neither a name of ours nor an address
            return False

    def check(self, scope):
        """Raise ApiError for a request that is refused."""
        headers = Headers(scope=scope)
        host = headers.get('host', '')
        origin = headers.get('origin')
        key = headers.get('authorization', '').removeprefix('Bearer ').encode('latin-1')
        if not self.is_ours(host):
            raise ApiError(403, f'this server does not answer to the name {host!r}. '
                           'To allow a name, start it with --allow_host=NAME.', code='forbidden')
        if origin and origin.split('://')[-1] != host:
            raise ApiError(403, f'pages of {origin!r} may not use this server.', code='forbidden')
        if self.key and scope['path'].startswith('/v1') and not hmac.compare_digest(key, self.key):
            raise ApiError(401, 'missing or wrong API key. Expected the value of GPT2_API_KEY.',
                           code='invalid_api_key')

    async def __call__(self, scope, receive, send):
        app = self.app
        try:
            self.check(scope)
        except ApiError as error:
            app = error.response()
        await app(scope, receive, send)
