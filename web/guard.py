"""Who may ask, and how long a client may take over its question."""
import hmac
import ipaddress
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from web.api import ApiError

PATIENCE_S = 20    # a client has this long to send a whole request, or to read what is sent
MAX_WAITING = 128  # connections that wait for their client; of more, the oldest is closed


class Connection(H11Protocol):
    """uvicorn's connection, which by itself would wait for its client for ever."""
    waiting = {}  # {connection: its timer}, oldest first

    def watch(self):
        """Start the clock when it is the client's turn to send or to read, or else stop it."""
        sends = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not (sends or self.flow.write_paused):
            self.forget()
        elif self not in self.waiting:
            self.waiting[self] = self.loop.call_later(PATIENCE_S, self.transport.abort)
        if len(self.waiting) > MAX_WAITING:
            oldest = next(iter(self.waiting))
            oldest.forget()
            oldest.transport.abort()

    def forget(self):
        if self in self.waiting:
            self.waiting.pop(self).cancel()

    def connection_made(self, transport):
        super().connection_made(transport)
        self.watch()

    def data_received(self, data):
        super().data_received(data)
        self.watch()

    def on_response_complete(self):
        super().on_response_complete()
        self.watch()

    def pause_writing(self):
        super().pause_writing()
        self.watch()

    def resume_writing(self):
        super().resume_writing()
        self.watch()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self.forget()

    def shutdown(self):
        """The server stops: do not wait for the rest of a request."""
        if self in self.waiting:
            self.transport.abort()
        else:
            super().shutdown()


class Guard:
    """ASGI middleware that refuses other sites' pages, and whoever lacks the API key.

    A site can point a name of its own at this machine (DNS rebinding), and then its pages count
    as ours. So the host that a request names must be an address, localhost or an allowed name.
    """

    def __init__(self, app, allow_host, key):
        self.app = app
        names = allow_host.lower().replace(',', ' ').split()
        self.names = {'localhost', *names}
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
