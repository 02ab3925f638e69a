"""What the lifecycle rules of a bucket do with the blobs of a site."""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any


#: storage classes whose objects cannot be read at once
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}
_PARTS = "let a lifecycle rule abort incomplete multipart uploads after 7 days"


def judge_lifecycle(
    rules: Iterable[Mapping[str, Any]], refusal: str, prefix: str
) -> tuple[bool | None, str, str]:
    """Return whether the rules are fit for blobs, what they mean, and what to do.

    :param str refusal: the code of an answer that told no rules, else "".
    :param str prefix: of all keys, with its slash.
    :returns: first True, False where they lose blobs, or None where something could be better.
    """
    if refusal:
        meaning = f"the rules are not told ({refusal}), which a site does not need either"
        return None, meaning, f"see yourself that no rule expires or archives blobs; {_PARTS}"
    active = [rule for rule in rules if rule.get("Status") == "Enabled" and _meets(rule, prefix)]
    for rule in active:
        if harm := _harm(rule):
            name = rule.get("ID") or "without a name"
            return False, f"the rule {name} {harm}", "remove it, or keep it from this prefix"
    ends_parts = any("AbortIncompleteMultipartUpload" in rule for rule in active)
    ends_versions = any("NoncurrentVersionExpiration" in rule for rule in active)
    if not ends_parts:
        return None, "no rule removes what is left of uploads that were killed", _PARTS
    more = ", and noncurrent versions" if ends_versions else ""
    return True, f"a rule removes unfinished uploads{more}; none touches blobs", ""


def _meets(rule: Mapping[str, Any], prefix: str) -> bool:
    """Tell whether a rule is for objects without tags below the prefix, or some of them."""
    found = rule.get("Filter", {})
    found = found.get("And", found)
    if "Tag" in found or found.get("Tags"):
        return False
    its_prefix = found.get("Prefix") or rule.get("Prefix") or ""
    blobs = f"{prefix}blobs/"
    return bool(its_prefix.startswith(blobs) or blobs.startswith(its_prefix))


def _harm(rule: Mapping[str, Any]) -> str:
    expiration = rule.get("Expiration", {})
    if "Days" in expiration or "Date" in expiration:
        when = f"after {expiration['Days']} days" if "Days" in expiration else "at a date"
        return f"deletes blobs {when}, whether or not they are needed"
    for transition in rule.get("Transitions", ()):
        if transition.get("StorageClass") in _ARCHIVES:
            return f"archives blobs as {transition['StorageClass']}, where they cannot be read"
    return ""
