"""The boto3 client of one configuration: made at the first traffic, once a process.

boto3 owns credentials, signing, TLS, retries and connections. Importing it
takes a quarter of a second and 40 MB, so that happens with the first request.
"""

import base64
from collections.abc import Callable
from collections.abc import Mapping
import hashlib
import io
import logging
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from . import values
from .breaker import Breaker
from .interfaces import PermanentS3Error
from .s3body import check_origin
from .s3errors import INTEGRITY_CODES
from .s3errors import RENEWAL_CODES
from .stats import ClientCounters


logger = logging.getLogger(__name__)

# Creating clients is not thread-safe in boto3, not even in different sessions. A child that is
# forked meanwhile would wait for ever for what its parent's thread is importing.
_creating = threading.RLock()
# Guarded by _creating: parsing boto's descriptions of services anew takes 50 ms a client.
_loader: Any = None


# Parts that are under way at the same time, of all large blobs together.
PARTS_AT_ONCE = 4
PART_ATTEMPTS = 3


class _Made:
    """What one process has made.

    :param make_signer: called once; guarded by _creating.
    """

    def __init__(self, client: Any, transfers: Any, make_signer: Callable[[], Any]) -> None:
        self.client = client
        self.transfers = transfers
        self._make_signer = make_signer
        self._signer: Any = None

    def signer(self) -> Any:
        signer = self._signer
        if signer is None:
            with _creating:
                signer = self._signer = self._signer or self._make_signer()
        return signer

    def forget_signer(self) -> None:
        self._signer = None


class S3Session:
    """Hands out a boto3 client and a transfer manager; threads share both.

    :param session_options: arguments of ``boto3.Session``.
    :param client_options: arguments of ``Session.client("s3", …)`` but config.
    :param config_options: arguments of ``botocore.config.Config``.
    :param int part_size: bytes of a part of a multipart transfer.
    :param bool must_be_confidential: whether requests carry a key of ours.
    :param ClientCounters counters: told of each request.
    :param Breaker breaker: asked before each request, and told of each answer.
    :param str public_endpoint_url: where browsers find the server, if that is elsewhere.
    :param str aws_signing_style: the addressing style of URLs for browsers on AWS, unless one is
        configured.
    :param bool is_read_only: whether nothing but GET and HEAD is sent.
    """

    def __init__(
        self,
        session_options: Mapping[str, Any],
        client_options: Mapping[str, Any],
        config_options: Mapping[str, Any],
        part_size: int,
        must_be_confidential: bool,
        counters: ClientCounters,
        breaker: Breaker,
        public_endpoint_url: str | None = None,
        aws_signing_style: str = "virtual",
        is_read_only: bool = False,
    ) -> None:
        self._session_options = dict(session_options)
        self._client_options = dict(client_options)
        self._config_options = dict(config_options)
        self._part_size = part_size
        self._must_be_confidential = must_be_confidential
        self._counters = counters
        self._breaker = breaker
        self._public_endpoint_url = public_endpoint_url
        self._aws_signing_style = aws_signing_style
        self._is_read_only = is_read_only
        #: whether s3transfer could not begin a transfer
        self.has_refused = False
        # The bucket's, as far as it was told.
        self._region: str | None = None
        # Guarded by _creating: _made, what this process has made and its pid.
        # A forked child must not use its parent's connections.
        self._made: tuple[int, _Made] | None = None

    def client(self) -> Any:
        """Return the boto3 S3 client of this process."""
        return self._get().client

    def signer(self) -> Any:
        """Return the client that signs URLs for browsers."""
        return self._get().signer()

    def transfers(self) -> Any:
        """Return the s3transfer manager of this process."""
        return self._get().transfers

    def _get(self) -> "_Made":
        made = self._made
        if made is None or made[0] != os.getpid():
            with _creating:
                made = self._made
                if made is None or made[0] != os.getpid():
                    made = self._made = (os.getpid(), self._create())
        return made[1]

    def _create(self) -> "_Made":
        import boto3
        import botocore.config
        from botocore.exceptions import NoCredentialsError
        import botocore.session
        import s3transfer.manager

        _keep_headers_out_of_logs()
        # Here, and not with the first connection: a fork waits until this is done.
        "localhost".encode("idna")
        global _loader
        session = botocore.session.Session()
        if _loader is None:
            _loader = session.get_component("data_loader")
        session.register_component("data_loader", _loader)
        # Dates stay text, as in the AWS CLI: parsing those of a listing takes most of its time.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        boto3_session = boto3.Session(botocore_session=session, **self._session_options)
        if boto3_session.get_credentials() is None:
            # Not a client that has none for ever: the next request looks for them again.
            raise NoCredentialsError
        options = {"config": botocore.config.Config(**self._config_options), **self._client_options}
        try:
            client = boto3_session.client("s3", **options)
        except ValueError as error:
            raise PermanentS3Error(
                f"boto3 refuses s3-endpoint-url or s3-region: {error}"
            ) from error
        # boto3 may have found the endpoint in the environment.
        endpoint_url = client.meta.endpoint_url
        if self._must_be_confidential and not values.is_confidential(endpoint_url, True):
            raise PermanentS3Error(f"SSE-C needs https, which {endpoint_url} is not")
        # Servers that predate the newer checksums want this one.
        client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
        client.meta.events.register_last("before-call.s3", _send_small_at_once)
        if self._is_read_only:
            # Whoever asks: the client refuses with better words.
            client.meta.events.register_first("before-call.s3", _refuse_change)
        # Before the request is signed, for which credentials may have to be fetched.
        client.meta.events.register_first("request-created.s3", self._before_request)
        client.meta.events.register_first("needs-retry.s3", self._after_answer)
        client.meta.events.register("needs-retry.s3.UploadPart", _retry_part)
        client.meta.events.register("after-call.s3.CompleteMultipartUpload", _check_completion)
        client.meta.events.register("after-call.s3.CopyObject", _check_copy)
        client.meta.events.register("after-call.s3.AbortMultipartUpload", _tell_what_stays)
        client.meta.events.register_last("before-parameter-build.s3", _ask_for_region_once)
        if self._config_options["request_checksum_calculation"] == "when_required":
            client.meta.events.register("choose-signer.s3.PutObject", _choose_signer)
        config = s3transfer.manager.TransferConfig(
            multipart_threshold=1,
            multipart_chunksize=self._part_size,
            # More threads send no faster from one process: they wait for each other.
            max_request_concurrency=PARTS_AT_ONCE,
        )
        transfers = s3transfer.manager.TransferManager(client, config)
        return _Made(client, transfers, lambda: self._make_signer(boto3_session, options, client))

    def _make_signer(self, session: Any, options: dict[str, Any], client: Any) -> Any:
        """Return a client that sends nothing; it has the other's credentials, which may expire."""
        import botocore.config

        host = urlsplit(self._public_endpoint_url or client.meta.endpoint_url).hostname or ""
        on_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        style = self._config_options["s3"]["addressing_style"]
        if on_aws and style == "auto" and ".vpce." not in host:
            # With "auto" boto3 signs for the global host, which newer regions do not answer at.
            style = self._aws_signing_style
        elif not self._public_endpoint_url and self._region is None:
            return client
        if self._region is not None:
            options = {**options, "region_name": self._region}
        config = botocore.config.Config(
            **{**self._config_options, "s3": {"addressing_style": style}}
        )
        if self._public_endpoint_url:
            options = {**options, "endpoint_url": self._public_endpoint_url}
        return session.client("s3", **{**options, "config": config})

    def _after_answer(self, response: Any, **kwargs: Any) -> None:
        if response is None:
            return
        answer = response[1].get("ResponseMetadata", {})
        if answer.get("HTTPStatusCode", 500) < 500:
            self._breaker.answered()
        told = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        self._learn_region(told or response[1].get("Error", {}).get("Region"))

    def _learn_region(self, region: str | None) -> None:
        """Take note of the bucket's region, which AWS tells whoever asks in another one.

        Then boto3 asks there. To sign a URL for the wrong one would be noticed by a browser only.
        """
        if region and region != self._region and self._made is not None:
            self._region = region
            self._made[1].forget_signer()

    def _before_request(self, request: Any, **kwargs: Any) -> None:
        self._breaker.check()
        attempt = request.context.get("retries", {}).get("attempt", 1)
        self._counters.add(requests=1, retries=int(attempt > 1))

    def renew(self) -> None:
        """Let the next request make a new client; requests under way keep the old one."""
        self._made = None

    def close(self) -> None:
        """Close connections and threads of this process; a later call opens them again."""
        with _creating:
            made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            if self.has_refused:
                # What s3transfer has refused to begin, as at exit, never ends; and the argument of
                # its shutdown() that would cancel it fails.
                made[1].transfers.__exit__(BaseException, "closed")
            else:
                made[1].transfers.shutdown()
            made[1].client.close()


def _keep_headers_out_of_logs() -> None:
    """Let boto's loggers be silent about requests, whose headers tell a key of ours (SSE-C).

    Where somebody has chosen their level, that counts.
    """
    for name in ("boto3", "botocore", "s3transfer"):
        its_logger = logging.getLogger(name)
        if its_logger.level == logging.NOTSET:
            its_logger.setLevel(logging.INFO)


def _refuse_change(model: Any, **kwargs: Any) -> None:
    if model.http["method"] not in ("GET", "HEAD"):
        raise PermanentS3Error(f"S3 {model.name} is not sent: access is read-only")


def _add_content_md5(params: dict[str, Any], **kwargs: Any) -> None:
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _send_small_at_once(params: dict[str, Any], **kwargs: Any) -> None:
    # boto3 makes a file of bytes, and asks the server before it sends a file: one more round trip.
    if isinstance(params.get("body"), io.BytesIO):
        params["headers"].pop("Expect", None)


def _ask_for_region_once(model: Any, context: dict[str, Any], **kwargs: Any) -> None:
    # boto3 asks by HeadBucket where a server sends on without a region; and when that is sent on,
    # too, it would ask again, until Python's stack ends.
    if model.name == "HeadBucket":
        context["s3_redirect"]["redirected"] = True


def _check_completion(http_response: Any, parsed: Mapping[str, Any], **kwargs: Any) -> None:
    if http_response.status_code < 300:
        check_origin(parsed)


def _check_copy(http_response: Any, parsed: Mapping[str, Any], **kwargs: Any) -> None:
    if http_response.status_code < 300:
        check_origin(parsed.get("CopyObjectResult", {}))


def _tell_what_stays(http_response: Any, parsed: Mapping[str, Any], **kwargs: Any) -> None:
    # S3transfer tells it at the level debug.
    if http_response.status_code >= 300 and http_response.status_code != 404:
        status = http_response.status_code
        code = parsed.get("Error", {}).get("Code")
        reason = "s3:AbortMultipartUpload is not granted" if status == 403 else code
        logger.warning("parts of an upload stay status=%d: %s", status, reason)


def _retry_part(response: Any, attempts: int, **kwargs: Any) -> float | None:
    # Seen at Hetzner now and then: UploadPart answers 400.
    if response is None or attempts >= PART_ATTEMPTS or response[0].status_code != 400:
        return None
    code = response[1].get("Error", {}).get("Code")
    return None if code in INTEGRITY_CODES or code in RENEWAL_CODES else 0.1 * attempts


def _choose_signer(**kwargs: Any) -> Any:
    """Sign a PUT by the SHA-256 that is stored with the object.

    boto3 would read the body once more to compute it. The server still refuses other bytes, and
    so vouches for the very digest that downloads are compared with.
    """
    import botocore.auth

    name = "zodb-s3blobs"
    if name not in botocore.auth.AUTH_TYPE_MAPS:

        class StoredDigestAuth(botocore.auth.S3SigV4Auth):
            def payload(self, request: Any) -> Any:
                return request.headers.get("x-amz-meta-zodb-sha256") or super().payload(request)

        botocore.auth.AUTH_TYPE_MAPS[name] = StoredDigestAuth
    return name


def _begin_in_child() -> None:
    global _creating
    _creating = threading.RLock()


os.register_at_fork(
    before=lambda: _creating.acquire(),
    after_in_parent=lambda: _creating.release(),
    after_in_child=_begin_in_child,
)
