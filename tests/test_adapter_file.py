import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from train import adapter_file, adapters, export
from train.adapter_file import Adapter, find
from train.config import LoraConfig, UserError

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of every kind of layer."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, LoraConfig(rank=2, targets=list(adapters.TARGETS)), seed=0)
    export.save_lora(pipeline, folder)
    return folder


def check(state, pipeline, tmp_path):
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    adapter_file.check(
        [Adapter(tmp_path / "a.safetensors", 1.0)], adapter_file.pipeline_shapes(pipeline)
    )


# Finding


def test_a_folder_and_a_file_are_found_with_their_scale(adapter):
    file = adapter / FILE
    assert find(str(adapter)) == find(str(file)) == Adapter(file, 1.0)
    assert find(f"{adapter}:0.5") == find(f"{file}:.5") == Adapter(file, 0.5)
    assert find(f"{file}:-2").scale == -2.0


def test_a_colon_in_a_name_is_no_scale(tmp_path, adapter):
    odd = tmp_path / "a:2"
    odd.mkdir()
    (odd / "style.safetensors").write_bytes((adapter / FILE).read_bytes())
    assert find(str(odd)) == Adapter(odd / "style.safetensors", 1.0)
    assert find(f"{odd}:3").scale == 3.0


def make(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_what_can_not_be_an_adapter_is_named_with_the_remedy(tmp_path):
    make(tmp_path / "run", "adapter/a.safetensors")
    make(tmp_path / "two", "a.safetensors", "b.safetensors")
    make(tmp_path / "pickles", "pytorch_lora_weights.bin")
    for name, part in {
        "nowhere": "no such file or folder",
        "two:half": "a scale is a number",
        "two:nan": "finite",
        "run": "its adapter is .*run/adapter",
        "two": "2 .safetensors files; name one",
        "pickles": "has no pytorch_lora_weights.safetensors or learned_embeds.safetensors",
        "pickles/pytorch_lora_weights.bin": "Pickles can run code",
    }.items():
        with pytest.raises(UserError, match=part):
            find(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_file_that_only_has_the_name_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="a.safetensors cannot be read"):
        adapter_file.header(tmp_path / "a.safetensors")


def embedding(file, shape=(2, 32), name="<owl>", **more):
    file.parent.mkdir(exist_ok=True)
    save_file({name: torch.full(shape, 0.5), **more}, file)
    return file


def test_embeddings_are_found_alone_several_and_beside_a_lora(tmp_path, adapter):
    one = embedding(tmp_path / "one" / "learned_embeds.safetensors")
    assert find(str(one)) == find(str(one.parent)) == Adapter(None, 1.0, (one,))
    other = embedding(tmp_path / "any" / "easy.safetensors", (32,), "emb_params")
    assert find(str(other.parent)) == Adapter(None, 1.0, (other,))
    both = tmp_path / "both"
    files = [embedding(both / f"learned_embeds-{k}.safetensors", name=f"<{k}>") for k in "ab"]
    assert find(str(both)) == Adapter(None, 1.0, tuple(files))
    (both / FILE).write_bytes((adapter / FILE).read_bytes())
    assert find(f"{both}:0.5") == Adapter(both / FILE, 0.5, tuple(files))
    assert find(f"{both / FILE}:0.5") == Adapter(both / FILE, 0.5)


def test_an_embedding_has_no_scale(tmp_path):
    file = embedding(tmp_path / "learned_embeds.safetensors")
    with pytest.raises(UserError, match="an embedding has no scale.*give adapters=.*safetensors$"):
        find(f"{file}:0.5")
    assert find(f"{file}:1").scale == 1


# Checking


def test_an_adapter_fits_its_base_loaded_or_in_its_folder(adapter, pipeline, tmp_path):
    shapes = adapter_file.pipeline_shapes(pipeline)
    adapter_file.check([find(str(adapter))], shapes)
    pipeline.save_pretrained(tmp_path / "base")
    assert adapter_file.folder_shapes(tmp_path / "base") == shapes


def kohya(key: str) -> str:
    module, _, factor = key.removesuffix(".weight").rpartition(".")
    side = {"lora_A": "down", "lora_B": "up"}[factor]
    return f"lora_{module.replace('.', '_')}.lora_{side}.weight"


SPELLINGS = {
    "diffusers": lambda key: key,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "older": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "kohya": kohya,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_keys_is_understood(adapter, pipeline, tmp_path, spelling):
    state = {SPELLINGS[spelling](k): v for k, v in load_file(adapter / FILE).items()}
    check(state, pipeline, tmp_path)
    key = next(key for key in state if "mid_block" in key and "attn1_to_q" in key.replace(".", "_"))
    odd = key.replace("mid_block", "mid_blook")
    with pytest.raises(UserError, match="mid_blook.*no such layer"):
        check({(odd if k == key else k): v for k, v in state.items()}, pipeline, tmp_path)
    with pytest.raises(UserError, match="does not fit the base: it changes unet_mid_block"):
        check(state | {key: torch.zeros(2, 999)}, pipeline, tmp_path)


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_the_text_encoder_s_layers_are_known(pipeline, tmp_path, prefix):
    name = f"{prefix}encoder.layers.1.self_attn.q_proj.lora_"
    check({f"{name}A.weight": torch.zeros(2, 32)}, pipeline, tmp_path)
    with pytest.raises(UserError, match="adapter of Stable Diffusion 1 .*base is .*width 32"):
        check({f"{name}A.weight": torch.zeros(2, 768)}, pipeline, tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        check({f"{name}B.weight": torch.zeros(768, 2)}, pipeline, tmp_path)


CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"


@pytest.mark.parametrize(
    ("state", "family"),
    [
        ({CROSS: torch.zeros(2, 768)}, "Stable Diffusion 1"),
        ({CROSS: torch.zeros(2, 1024)}, "Stable Diffusion 2"),
        ({CROSS: torch.zeros(2, 2048)}, "Stable Diffusion XL"),
        ({"lora_te2_text_model_x.lora_down.weight": torch.zeros(2, 8)}, "Stable Diffusion XL"),
        ({"text_encoder_2.x.lora_A.weight": torch.zeros(2, 8)}, "Stable Diffusion XL"),
    ],
)
def test_an_adapter_of_another_family_is_refused_by_name(pipeline, tmp_path, state, family):
    with pytest.raises(UserError, match=f"adapter of {family} .*base is .*width 32"):
        check(state, pipeline, tmp_path)


def test_tensors_of_something_else_are_no_adapter(pipeline, tmp_path):
    with pytest.raises(UserError, match="holds no LoRA"):
        check({"unet.conv_in.weight": torch.zeros(3, 3)}, pipeline, tmp_path)


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (7, "another")]
)
def test_an_embedding_of_another_family_is_refused_by_name(pipeline, tmp_path, width, family):
    file = embedding(tmp_path / "learned_embeds.safetensors", (1, width))
    with pytest.raises(UserError, match=f"embedding of {family}.*base is .*width 32"):
        adapter_file.check([find(str(file))], adapter_file.pipeline_shapes(pipeline))
    large = {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}
    with pytest.raises(UserError, match="Stable Diffusion XL"):
        check(large, pipeline, tmp_path)


def test_a_word_that_is_known_is_refused_by_name(pipeline, tmp_path):
    shapes = adapter_file.pipeline_shapes(pipeline)
    first = find(str(embedding(tmp_path / "a.safetensors")))
    again = find(str(embedding(tmp_path / "<owl>.safetensors", (32,), "emb_params")))
    adapter_file.check([first], shapes, {"<owls>", "<owl>_2"})
    for words in ({"<owl>"}, {"<owl>_1"}):
        with pytest.raises(UserError, match="for the word <owl>, and <owl>.* vocabulary already"):
            adapter_file.check([first], shapes, words)
    with pytest.raises(UserError, match="<owl>.safetensors is for the word <owl>, and"):
        adapter_file.check([first, again], shapes)


def scheduler(folder, **settings):
    folder.mkdir(exist_ok=True)
    tiny_pipeline().scheduler.__class__(**settings).save_pretrained(folder / "scheduler")
    return folder


def test_adapters_that_were_trained_for_different_schedulers_are_refused_together(
    pipeline, adapter, tmp_path
):
    for name, kind in (("a", "epsilon"), ("b", "v_prediction")):
        (scheduler(tmp_path / name, prediction_type=kind) / FILE).write_bytes(
            (adapter / FILE).read_bytes()
        )
    shapes = adapter_file.pipeline_shapes(pipeline)
    adapter_file.check([find(str(tmp_path / "a")), find(str(adapter))], shapes)
    with pytest.raises(UserError, match="prediction_type=v_prediction, another of them with eps"):
        adapter_file.check([find(str(tmp_path / "a")), find(str(tmp_path / "b"))], shapes)


# Applying


def test_embeddings_are_read_under_their_names(tmp_path):
    pipeline = tiny_pipeline()
    one = embedding(tmp_path / "a.safetensors", (2, 32), "<owl>")
    kohya_s = embedding(tmp_path / "easy.safetensors", (1, 32), "emb_params")
    adapter_file.apply(pipeline, [find(str(one)), find(str(kohya_s))])
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<owl>", "<owl>_1", "easy"])
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert len(set(ids)) == 3 and torch.equal(rows, torch.full((3, 32), 0.5))


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_pictures_are_sampled_as_the_adapter_was_trained(tmp_path, sampler):
    import diffusers

    pipeline = tiny_pipeline()
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    file = embedding(tmp_path / "x" / "learned_embeds.safetensors")
    scheduler(tmp_path / "x", prediction_type="epsilon")
    adapter_file.apply(pipeline, [find(str(file))])
    assert type(pipeline.scheduler).__name__ == sampler
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    scheduler(tmp_path / "x", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    adapter_file.adopt_scheduler(pipeline, adapter_file.trained_with([find(str(file))]))
    able = sampler if sampler != "PNDMScheduler" else "DDIMScheduler"
    assert type(pipeline.scheduler).__name__ == able
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-4


def test_the_base_s_own_scheduler_stays_where_nothing_differs(tmp_path):
    pipeline = tiny_pipeline()
    before = pipeline.scheduler
    file = embedding(tmp_path / "x" / "learned_embeds.safetensors")
    pipeline.scheduler.save_pretrained(tmp_path / "x" / "scheduler")
    adapter_file.apply(pipeline, [find(str(file))])
    assert pipeline.scheduler is before


def test_adapters_act_together_each_at_its_scale(adapter, tmp_path):
    state = load_file(adapter / FILE)
    trained = {k: torch.full_like(v, 0.1) for k, v in state.items()}
    save_file(trained, tmp_path / "a.safetensors")
    save_file({k: 2 * v for k, v in trained.items()}, tmp_path / "b.safetensors")
    pipeline = tiny_pipeline()
    layer_name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    x = torch.randn(1, 64)
    base = pipeline.unet.get_submodule(layer_name)(x)
    adapter_file.apply(
        pipeline,
        [Adapter(tmp_path / "a.safetensors", 0.5), Adapter(tmp_path / "b.safetensors", -1.0)],
    )
    down, up = (trained[f"unet.{layer_name}.lora_{side}.weight"] for side in "AB")
    expected = base + (0.5 - 4.0) * x @ down.T @ up.T
    torch.testing.assert_close(pipeline.unet.get_submodule(layer_name)(x), expected)


def test_no_adapters_leave_the_pipeline_alone(pipeline):
    adapter_file.apply(pipeline, [])
    assert not hasattr(pipeline.unet, "peft_config")
