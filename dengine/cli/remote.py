"""One HTTP request to whichever node answers, for the client commands.

Standard library only, and honest about writes: a request is sent again, to the next endpoint, only
when it is a reading one or a renewal, when it certainly did nothing, or when it carries an
`Idempotency-Key`, under which it happens once (`client/attempts.py`). Redirects are not followed.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dengine.client.attempts import Attempts, Key, Kind
from dengine.client.encoding import parse_endpoint
from dengine.client.stopwatch import Stopwatch
from dengine.errors import ClusterUnavailable, DengineError, RequestTimeout, from_dict
from dengine.security import is_absent_credential, read_token

DEFAULT_ENDPOINT = "127.0.0.1:9081"
SYSTEM_CONFIG = Path("/etc/dengine/dengine.toml")
READING = ("GET", "HEAD")
KEYED_ROUNDS = 2  # over the endpoints: a lost answer is asked for once more
REPLY_MARGIN_S = 1.0  # the node's own 504 says more than our timeout, so let it arrive first


def resolve_endpoints(named: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The "host:port" list to try, in order.

    `named` (`--endpoint`), else `DENGINE_ENDPOINTS` (separated by commas or blanks), else the
    configuration file of this host (its own address, then the other members), else 127.0.0.1:9081.

    Raises:
        ValueError: one of them is not an address.
        ConfigError: the configuration file is there and wrong.
    """
    given = list(named) or environ.get("DENGINE_ENDPOINTS", "").replace(",", " ").split()
    if given:
        return [parse_endpoint(text) for text in given]
    path = _config_path(environ)
    return [DEFAULT_ENDPOINT] if path is None else _configured_endpoints(path, environ)


def resolve_token(named: Path | None, environ: Mapping[str, str]) -> str | None:
    """The token to send with every request, None without one.

    `named` (`--token-file`), else `DENGINE_TOKEN_FILE`, else the `security.token_file` of this
    host's configuration. Never an argument or a variable itself: others can read those.

    Raises:
        ConfigError: the file is not acceptable, or the configuration is wrong.
    """
    if named is not None:
        return read_token(named, "--token-file")
    if environ.get("DENGINE_TOKEN_FILE"):
        return read_token(Path(environ["DENGINE_TOKEN_FILE"]), "$DENGINE_TOKEN_FILE")
    file, key = _configured_token(environ)
    return None if file is None or is_absent_credential(file) else read_token(file, key)


def without_token(environ: Mapping[str, str]) -> str:
    """What to do about a token that a node asked for and `resolve_token` did not find; or ""."""
    file, _ = _configured_token(environ)
    if file is None or not is_absent_credential(file):
        return ""
    return (
        f"; {file} is there only while its unit runs: name what it is made from with --token-file "
        "(/etc/dengine/secrets/token where the playbooks made it)"
    )


def _configured_token(environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """The token's file that the configuration of this host names, and its key for messages."""
    path = _config_path(environ)
    if path is None:
        return None, ""
    from dengine import config  # only here: the installed client alone has no msgspec

    loaded = config.read(path, environ)
    return loaded.security.token_file, f"{loaded.source}: security.token_file"


def _config_path(environ: Mapping[str, str]) -> Path | None:
    """The configuration of this host, if it has one that this user may read."""
    if environ.get("CONFIG_PATH"):
        return Path(environ["CONFIG_PATH"])
    try:
        with SYSTEM_CONFIG.open("rb"):
            return SYSTEM_CONFIG
    except OSError:  # perhaps that cluster needs no token
        return None


def _configured_endpoints(path: Path, environ: Mapping[str, str]) -> list[str]:
    from dengine import config  # only here: the installed client alone has no msgspec

    loaded = config.read(path, environ)
    own = loaded.cluster.advertise_address or loaded.own_entry.address
    others = [m.address for m in loaded.cluster.initial_cluster if m.id != loaded.cluster.node_id]
    reachable = [
        f"127.0.0.1:{config.parse_address(address)[1]}" if config.is_wildcard(address) else address
        for address in (own, *others)
    ]
    return list(dict.fromkeys(reachable))


@dataclass(frozen=True, slots=True)
class Reply:
    endpoint: str
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Remote:
    """The cluster as one addressable thing.

    Args:
        endpoints: "host:port", tried in this order.
        timeout_s: for one `call`, every endpoint included.
        token: sent with every request.
    """

    def __init__(
        self, endpoints: Sequence[str], timeout_s: float, token: str | None = None
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.timeout_s = timeout_s
        self.token = token

    @property
    def authorization(self) -> dict[str, str]:
        """The header that every request carries, if any."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def only(self, endpoint: str) -> Remote:
        """The same with a single endpoint."""
        return Remote((endpoint,), self.timeout_s, self.token)

    def within(self, timeout_s: float) -> Remote:
        """The same with another time limit."""
        return Remote(self.endpoints, timeout_s, self.token)

    def beginning_with(self, endpoint: str) -> Remote:
        """The same, with `endpoint`, which is one of them, tried before the others."""
        others = (other for other in self.endpoints if other != endpoint)
        return Remote((endpoint, *others), self.timeout_s, self.token)

    def call(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        key: Key | None = None,
        kind: Kind | None = None,
    ) -> Reply:
        """Send one request and return its 2xx answer.

        Args:
            key: the Idempotency-Key of a write, which may then be sent again.
            kind: of a POST that is no write.

        Raises:
            ClusterUnavailable: no endpoint could be reached; nothing happened.
            RequestTimeout: a write was sent and no answer came; its outcome is unknown.
            DengineError: the cluster's own refusal, as the class that the node raised.
        """
        kind = kind or ("read" if method in READING else "write")
        attempts, awake = Attempts(kind, key), Stopwatch(time.monotonic)
        repeatable = kind != "write" or key is not None
        deadline = time.monotonic() + self.timeout_s
        tries = self.endpoints * (KEYED_ROUNDS if repeatable and method not in READING else 1)
        problems: list[str] = []
        refusal: DengineError | None = None
        for position, endpoint in enumerate(tries):
            if position and position % len(self.endpoints) == 0:
                time.sleep(min(attempts.pause_s(), max(deadline - time.monotonic(), 0.0)))
            now = time.monotonic()
            if not attempts.may_send(awake.elapsed_s()):
                break
            left = max(deadline - now, 0.1)
            share = left / (len(tries) - position)
            connection = http.client.HTTPConnection(endpoint, timeout=share)
            try:
                connection.connect()
            except OSError as error:
                problems.append(f"{endpoint}: {_reason(error)}")
                continue
            attempts.sent(position, awake.elapsed_s())
            keyed = {} if key is None else {"Idempotency-Key": key.text}
            sending = {**(headers or {}), **keyed, **self.authorization}
            wait = share if repeatable else left
            # A lease does not wait: the next node may renew it as well.
            margin = 0.0 if kind == "renewal" else REPLY_MARGIN_S
            try:
                return _exchange(connection, endpoint, method, target, body, sending, wait, margin)
            except (OSError, http.client.HTTPException) as error:
                problems.append(f"{endpoint}: {_reason(error)}")
                if not repeatable:
                    break
            except DengineError as error:
                attempts.refused(position, error)
                if not error.retryable or not (repeatable or error.outcome == "none"):
                    raise attempts.certain(error) from None
                problems.append(f"{endpoint}: {error.message}")
                refusal = error
            finally:
                connection.close()
        if attempts.outcome == "unknown":
            raise _unanswered(problems[-1], key)
        reasons = "; ".join(dict.fromkeys(problems))
        raise refusal or ClusterUnavailable(f"no endpoint answered: {reasons}")

    def json(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        key: Key | None = None,
        kind: Kind | None = None,
    ) -> Any:
        """`call` with a JSON body (None: no body), and the JSON of the answer."""
        if body is None:
            return self.call(method, target, key=key, kind=kind).json()
        # No longer than what was read, for a node counts its bytes; and it is the node's to refuse
        # what is no UTF-8 in there.
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        data = text.encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json"}
        return self.call(method, target, data, headers, key=key, kind=kind).json()


def _unanswered(problem: str, key: Key | None) -> RequestTimeout:
    advice = "read before you write again"
    if key is not None:
        advice = (
            f"the same command with --idempotency-key {key.text} tells, and does it at most once"
        )
    return RequestTimeout(
        f"no answer came back ({problem}): the write may or may not have happened: {advice}"
    )


def _exchange(
    connection: http.client.HTTPConnection,
    endpoint: str,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
    wait_s: float,
    margin_s: float,
) -> Reply:
    assert connection.sock is not None
    connection.sock.settimeout(wait_s + margin_s)
    timeout_ms = min(max(int(wait_s * 1000), 100), 60_000)
    connection.request(method, target, body, {**headers, "Dengine-Timeout-Ms": str(timeout_ms)})
    response = connection.getresponse()
    data = response.read()
    if 200 <= response.status < 300:
        return Reply(endpoint, response.headers, data)
    try:
        described = json.loads(data)
        raise from_dict(described) if isinstance(described, dict) else ValueError
    except ValueError:
        raise DengineError(
            f"{endpoint} answered {response.status} {response.reason}: is that a dengine node?",
            outcome="none" if response.status < 500 else "unknown",
        ) from None


def _reason(error: Exception) -> str:
    """A few words for a failed connection."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
