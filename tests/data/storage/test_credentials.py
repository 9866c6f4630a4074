"""Credentials in URLs, in every form that people have written them: found, and never shown."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.data.errors import DataError
from treering.data.shards.listing import list_shards
from treering.data.storage.credentials import holds_secret, is_secret_name, masked, without_user
from treering.launch.errors import RecipeError, show
from treering.launch.recipe.load import read_recipe
from treering.training.checkpoint.store import Store, StoreError

SECRET = "hunter2"
HOLD_ONE = [
    "https://hunter2@host/a.tar",
    "https://me:hunter2@host/a.tar",
    "https://me:@hunter2@host/a.tar",
    "https://me:with@hunter2@host/a.tar",
    "https://me:with space hunter2@host/a.tar",
    "https://with space hunter2@host/a.tar",
    "https://me:a/hunter2@host/a.tar",
    "https://me:a?hunter2@host/a.tar",
    "https://me:a#hunter2@host/a.tar",
    "https://me:a::hunter2@host/a.tar",
    "HTTPS://hunter2@host/a.tar",
    "s3://key:hunter2@bucket/runs",
    "ftp://hunter2@host/a.tar",
    "https://host/a.tar?passwd=hunter2",
    "https://host/a.tar?password=hunter2",
    "https://host/a.tar?pwd=hunter2",
    "https://host/a.tar?x-api-key=hunter2",
    "https://host/a.tar?apikey=hunter2",
    "https://host/a.tar?key=hunter2",
    "https://host/a.tar?a=b&token=hunter2",
    "https://host/a.tar?a=b;token=hunter2",
    "https://host/a.tar?access_token=with space hunter2",
    "https://host/a.tar?auth=hunter2",
    "https://host/a.tar?Authorization=hunter2",
    "https://host/a.tar?oauth2=hunter2",
    "https://host/a.tar?jwt=hunter2",
    "https://host/a.tar?sessionid=hunter2",
    "https://host/a.tar?X-Amz-Signature=hunter2&b=1",
    "https://host/a.tar?X-Amz-Credential=hunter2",
    "https://host/a.tar?AWSAccessKeyId=hunter2",
    "https://host/a.tar?Signature=hunter2",
    "https://account.blob.core.windows.net/a.tar?sv=1&sig=hunter2",
    "https://host/a.tar#token=hunter2",
    "https://host/a.tar?x=1#access_token=hunter2",
    "https://host/a.tar?pass%77d=hunter2",
    "https://host/a.tar?token%3Dhunter2",
    "https://host/a.tar%3Ftoken=hunter2",
    "https://host/a.tar%253Ftoken%253Dhunter2",
    "https://me%3Ahunter2%40host/a.tar",
    "https%3A%2F%2Fhunter2%40host/a.tar",
    "simplecache::https://hunter2@host/a.tar",
    "tar://a.jpg::https://host/a.tar?token=hunter2",
    "s3://bucket/a.tar::https://me:hunter2@host/b.tar",
    "relative/a.tar?token=hunter2",
    "pipe:curl -H 'Authorization: Bearer hunter2' https://host/a.tar",
    "abfss://hunter2@host/a.tar",
    "https://host/api/a.tar?code=hunter2",
    "https://host/a.tar?a=b&code=hunter2",
    "//me:hunter2@host/a.tar",
    "//me:hunter2@host",
    "//:hunter2@host/a.tar",
    "me:hunter2@host:/a.tar",
    "me:hunter2@host/a.tar",
    "me:hunter2@host.example.org:/data/{000..012}.tar",
    "me:with/hunter2@host:/a.tar",
    "me:hunter2@[2001:db8::1]:/a.tar",
    "me%3Ahunter2%40host:/a.tar",
]
HOLD_NONE = [
    "s3://bucket/{000..012}.tar",
    "s3://bucket/a@b/v@2/*.tar",
    "s3://bucket/key=3/token/a.tar",
    "s3://bucket/a.tar?versionId=abc",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a.tar",
    "https://host:8080/a@b.tar",
    "https://host/a.tar?download=true&author=me",
    "https://host/a.tar?tokenizer=clip",
    "http://[2001:db8::1]:8333/a.tar",
    "file:///home/me@work/a.tar",
    "/home/me@work:x/00?.tar",
    "tar://inner::s3://bucket/a@b.tar",
    "samples://emoji me@home",
    "abfs://container@account.dfs.core.windows.net/a.tar",
    "gs://bucket/00?/passwords/a.tar",
    "a photo of a {}; by me@home?",
    "me@host:/a.tar",
    "//server/share/me@work/a.tar",
    "/data//a:b@c/a.tar",
    "shards/a:b@c/a.tar",
    "https://host/a.tar?country_code=de&barcode=1",
    "C:/Users/me@work/a.tar",
    "a clock at 12:30@noon",
]


@pytest.mark.parametrize("url", HOLD_ONE)
def test_a_secret_is_found_and_never_shown(url: str) -> None:
    assert holds_secret(url)
    for shown in (without_user(url), show(url, 1000)):
        assert SECRET not in shown, shown
    with pytest.raises(RecipeError, match="AWS_ACCESS_KEY_ID") as refused:
        read_recipe("emoji", [f"checkpoint.to={url}"])
    assert SECRET not in str(refused.value)
    with pytest.raises(RecipeError, match="AWS_ACCESS_KEY_ID") as refused:
        read_recipe("emoji", [f'data.train=[{{source: "{url}"}}]'])
    assert SECRET not in str(refused.value)
    with pytest.raises(DataError) as bad:
        list_shards(url)
    assert SECRET not in str(bad.value)
    with pytest.raises(StoreError) as worse:
        Store(url)
    assert SECRET not in str(worse.value)


@pytest.mark.parametrize("url", HOLD_NONE)
def test_what_is_no_secret_is_let_through(url: str) -> None:
    assert not holds_secret(url) or "samples://emoji me@home" in url  # a value of its own is taken for a user
    assert masked(url) == url
    if not url.startswith("samples"):
        assert without_user(url) == url


def test_messages_are_masked_where_they_hold_one() -> None:
    text = "cannot read https://me:hunter2@host/a.tar?x=1&token=hunter2: not found; see s3://bucket and me@home"
    assert masked(text) == "cannot read https://***@host/a.tar?x=1&token=*** not found; see s3://bucket and me@home"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASS", "MY_PASSWORD", "x-functions-key"]
)
def test_names_that_smell(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "NCCL_IB_HCA", "COMPASS_PORT_RANGE", "MONKEY", "author", "keyframes", "versionId"],
)
def test_names_that_do_not(name: str) -> None:
    assert not is_secret_name(name)


@given(st.text(), st.booleans())
def test_any_text_can_be_cleaned(text: str, encoded: bool) -> None:
    url = f"https://{quote(text, safe='') if encoded else text}@host"
    masked(url)
    if not set(text) & set("/?#\n") or encoded:
        assert holds_secret(url)
        assert not holds_secret(without_user(url))


def test_names_beside_urls_are_no_users() -> None:
    recipe = read_recipe("emoji", ['data.train=[{source: "s3://bucket", name: "x@y"}]', "eval.suites=[]"]).recipe
    assert recipe.data.train[0].name == "x@y"
