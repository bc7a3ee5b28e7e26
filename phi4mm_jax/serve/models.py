"""Bodies of requests, as the OpenAPI document describes them.

Keys whose value must be one that changes nothing, such as `frequency_penalty`, are here so that any other is refused by
name.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.processing.video import MAX_FRAMES
from phi4mm_jax.serve.schemas import (
    CHAT,
    COMPLETION,
    MESSAGE,
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    TOOL,
    TOOL_CALL,
    TOOL_CHOICE,
)

Positive = Annotated[int, Field(ge=1)]
Word = Annotated[int, Field(ge=0, lt=2**31)]  # that a device's integer holds
Temperature = Annotated[float, Field(ge=0, le=1e30)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 is off, as 0
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=1e-3, le=1e3)]
AdapterName = Annotated[str, WithJsonSchema({"enum": list(adapter_choices())})]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
NULLS: dict[str, Any] = {"additionalProperties": {"type": "null"}}  # as good as absent


@dataclass(frozen=True, eq=False)  # has a hash, whatever the value
class Only:
    """Annotation of a key with which nothing is supported but this value, which changes nothing, and null."""

    value: Any

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"const": self.value}, {"type": "null"}]}

    def _check(self, given: Any) -> Any:
        same = given == self.value and isinstance(given, bool) is isinstance(self.value, bool)  # False == 0
        if not same and given is not None:
            raise PydanticCustomError("unsupported", "{given} is not supported, only {expected}; leave it out", {
                "given": f"{json.dumps(given):.60}", "expected": json.dumps(self.value),
            })  # fmt: skip
        return given


def _check_text(prompt: Any) -> Any:
    if isinstance(prompt, int) or (isinstance(prompt, list) and any(isinstance(one, int | list) for one in prompt)):
        raise PydanticCustomError(
            "token_ids", "token ids are not taken; send text, in which special tokens are recognised"
        )
    return prompt


class FormModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Model(FormModel):
    model_config = ConfigDict(json_schema_extra=NULLS)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Drop unknown keys that are null."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key in cls.model_fields}


class TextPart(Model):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Model):
    type: Literal["refusal"]
    refusal: str


class ImageURL(Model):
    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageURL | str


class InputImagePart(Model):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class InputAudio(Model):
    data: str = Field(description="base64, or a data URL")
    format: str | None = Field(None, description="told from the data, whatever this says")


class InputAudioPart(Model):
    type: Literal["input_audio"]
    input_audio: InputAudio


class MediaURL(Model):
    url: str


class AudioPart(Model):
    type: Literal["audio_url"]
    audio_url: MediaURL | str


class VideoURL(Model):
    url: str
    frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = Field(None, description="taken of it, at most")
    max_crops: Positive | None = Field(None, description="of each frame")


class VideoPart(Model):
    type: Literal["video_url"]
    video_url: VideoURL | str


Part = Annotated[
    TextPart | RefusalPart | ImagePart | InputImagePart | InputAudioPart | AudioPart | VideoPart,
    Field(discriminator="type"),
]


PART_TYPES = (
    "text", "input_text", "output_text", "refusal", "image_url", "input_image", "input_audio", "audio_url", "video_url"
)  # fmt: skip
PART_MODELS = ("ImageURL", "MediaURL", "VideoURL")


ToolCall = Annotated[dict[str, Any], WithJsonSchema(TOOL_CALL)]


class Message(BaseModel):
    """Other keys, such as those of an answer that is sent back, are ignored unless they look like media."""

    model_config = ConfigDict(extra="allow", json_schema_extra=MESSAGE)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = Field(None, description="only an answer that calls tools may have none")
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant's message")
    tool_call_id: str | None = None


class StreamOptions(Model):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = Field(None, description="nothing is added to pieces, whatever this says")


class SamplingOptions(Model):
    """Settings that chats and texts share."""

    model: str | None = Field(None, description="by default the server's own; or a user's adapter")
    max_tokens: Positive | None = None
    temperature: Temperature | None = Field(None, description="by default 0, which is greedy")
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Word | None = Field(None, description="by default another one in each request")
    n: Positive | None = None
    use_beam_search: StrictBool | None = Field(None, description="`n` answers by beam search, the likeliest first")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(None, description="of a beam search")
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    adapter: AdapterName | None = Field(None, description="by default that of the media")
    structured_outputs: Annotated[dict[str, Any], WithJsonSchema(STRUCTURED_OUTPUTS)] | None = Field(
        None, description="not beside response_format"
    )
    draft: Literal["lookup"] | None = Field(None, description='"lookup", where the server allows it: copies are faster')
    skip_special_tokens: StrictBool | None = Field(None, description="true leaves them out of the text")
    timeout: Seconds | None = Field(None, description="seconds that the request may take, at most the server's limit")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    presence_penalty: Annotated[float | None, Only(0)] = None
    frequency_penalty: Annotated[float | None, Only(0)] = None
    logit_bias: Annotated[dict[str, Any] | None, Only({})] = None
    best_of: Annotated[int | None, Only(1)] = None
    early_stopping: Annotated[bool | None, Only(False)] = None
    ignore_eos: Annotated[bool | None, Only(False)] = None
    min_tokens: Annotated[int | None, Only(0)] = None
    bad_words: Annotated[list[str] | None, Only([])] = None
    add_special_tokens: Annotated[bool | None, Only(False)] = None
    include_stop_str_in_output: Annotated[bool | None, Only(False)] = None

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingOptions):
    model_config = ConfigDict(json_schema_extra=CHAT | NULLS)
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Positive | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Annotated[dict[str, Any], WithJsonSchema(TOOL)]] | None = None
    tool_choice: Annotated[str | dict[str, Any], WithJsonSchema(TOOL_CHOICE)] | None = Field(
        None, description='"required" and a name need `tools`'
    )
    response_format: Annotated[dict[str, Any], WithJsonSchema(RESPONSE_FORMAT)] | None = None
    continue_final_message: StrictBool | None = None
    add_generation_prompt: StrictBool | None = Field(None, description="true, or false with continue_final_message")
    chat_template_kwargs: Annotated[dict[str, Any] | None, Only({})] = None
    echo: Annotated[bool | None, Only(False)] = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    parallel_tool_calls: StrictBool | None = None
    store: StrictBool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SamplingOptions):
    model_config = ConfigDict(json_schema_extra=COMPLETION | NULLS)
    prompt: Annotated[Text | Annotated[list[Text], Field(min_length=1)], BeforeValidator(_check_text)] = Field(
        description="raw: special tokens in it are such, and none stands for a medium"
    )
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: StrictBool | None = None


class LoadAdapterRequest(Model):
    lora_name: str = Field(description="by which requests ask for it, as their model")
    lora_path: str = Field(description="its folder, within the one that the server allows")


class UnloadAdapterRequest(Model):
    lora_name: str
    lora_int_id: int | None = Field(None, description="has no effect, whatever this says")


class BatchRequest(Model):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Annotated[str, Field(description="has no effect, whatever this says")] = "24h"
    metadata: dict[str, Any] | None = None


class FileForm(FormModel):
    file: UploadFile = Field(description="requests, one JSON object a line")
    purpose: Literal["batch"]


class BatchListQuery(FormModel):
    limit: int | None = Field(None, ge=1, le=10_000, description="of one page; all by default")
    after: str | None = Field(None, description="the id that the page before ends with")


class FileListQuery(BatchListQuery):
    order: Literal["asc", "desc"] = Field("desc", description="by time; desc has the newest first")
    purpose: Literal["batch", "batch_output"] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
