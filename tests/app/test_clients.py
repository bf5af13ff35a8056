"""An unmodified Hugging Face client against a real server."""

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")


async def test_translation(url: str) -> None:
    async with huggingface_hub.AsyncInferenceClient(f"{url}/translate") as client:
        answer = await client.translation("I go home", src_lang="en", tgt_lang="ko")
        assert answer.translation_text == "I GO HOME"
        answer = await client.translation("I go", generate_parameters={"num_beams": 2})
        assert answer.translation_text == "I GO"


async def test_fill_mask(url: str) -> None:
    async with huggingface_hub.AsyncInferenceClient(f"{url}/fill-mask") as client:
        answer = await client.fill_mask("나는 [MASK]에 간다", targets=["집", "학교"], top_k=1)
        assert [(each.token_str, each.sequence) for each in answer] == [("집", "나는 집에 간다")]


async def test_text_generation(url: str) -> None:
    async with huggingface_hub.AsyncInferenceClient(f"{url}/generate") as client:
        assert await client.text_generation("a", max_new_tokens=3) == "bcd"
        whole = await client.text_generation(
            "a", max_new_tokens=3, details=True, do_sample=True, seed=4, best_of=2, decoder_input_details=True
        )
        assert (whole.generated_text, whole.details.finish_reason, whole.details.seed) == ("bcd", "length", 4)
        assert len(whole.details.prefill) == 2
        assert whole.details.best_of_sequences[0].seed == 5


async def test_streamed_text_generation(url: str) -> None:
    async with huggingface_hub.AsyncInferenceClient(f"{url}/generate") as client:
        pieces = [piece async for piece in await client.text_generation("a", max_new_tokens=3, stream=True)]
        assert pieces == ["b", "c", "d"]
        events = [e async for e in await client.text_generation("a", stop=["d"], stream=True, details=True)]
        assert events[-1].generated_text == "bcd"
        assert events[-1].details.finish_reason == "stop_sequence"


async def test_errors_reach_the_caller(url: str) -> None:
    async with huggingface_hub.AsyncInferenceClient(f"{url}/generate") as client:
        with pytest.raises(Exception, match="max_new_tokens is 9999, the limit is 1 to 99"):
            await client.text_generation("a", max_new_tokens=9999)
