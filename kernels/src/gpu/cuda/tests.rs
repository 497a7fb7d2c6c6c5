//! What can be said of a CUDA device where there is none: which errors come, that nothing panics, and that the tests of
//! the device pass over a fake driver.

use std::process::Command;

use super::*;
use crate::gpu::image::{SOURCES, Source};
use crate::gpu::tests::{FAKE_DRIVER_VARIABLE, sources};

/// Something of CUDA is not there; a failure where it must be.
fn missing(what: &str) {
    if cfg!(feature = "cuda-tests") {
        panic!("{what}");
    }
    eprintln!("{what}: not tested");
}

#[test]
fn opening_says_what_is_missing() {
    let error = CudaDevice::open(1000).unwrap_err();
    match error {
        CudaError::NoDriver => assert!(!library::has_driver()),
        CudaError::NoDevice | CudaError::DriverFailed { .. } => assert!(library::has_driver()),
        CudaError::NoSuchDevice { ordinal, count } => assert!(ordinal == 1000 && (1..1000).contains(&count)),
        error => panic!("{error}"),
    }
}

#[test]
fn machines_that_will_not_do_are_refused() {
    assert_eq!(open::check_driver_version(13000), Ok(()));
    assert_eq!(open::check_driver_version(12000), Ok(()));
    assert_eq!(open::check_driver_version(11080), Err(CudaError::DriverTooOld { major: 11, minor: 8 }));
    assert_eq!(open::check_ordinal(0, 1), Ok(()));
    assert_eq!(open::check_ordinal(0, 0), Err(CudaError::NoDevice));
    assert_eq!(open::check_ordinal(2, 2), Err(CudaError::NoSuchDevice { ordinal: 2, count: 2 }));
    assert_eq!(open::check_capability("A100", (8, 0)), Ok(()));
    let error = open::check_capability("T4", (7, 5)).unwrap_err();
    assert_eq!(error.to_string(), "the CUDA device T4 has compute capability 7.5, 8.0 or newer is needed");
    assert_eq!(open::check_memory("A100", 2 << 30, 4 << 30), Ok(()));
    let error = open::check_memory("A100", 5, 4 << 30).unwrap_err();
    assert!(error.to_string().contains("5 of 4294967296 bytes"), "{error}");
}

/// Every function of the driver that is called is looked for first, since cudarc panics where one is missing.
#[test]
fn all_driver_functions_are_looked_for() {
    let folder = sources().join("kernels/src/gpu");
    let files = std::fs::read_dir(folder.join("cuda")).unwrap().map(|entry| entry.unwrap().path());
    let mut called = std::collections::BTreeSet::new();
    for file in files.chain([folder.join("cuda.rs")]) {
        let text = std::fs::read_to_string(file).unwrap();
        for call in text.split(concat!("sys", "::cu")).skip(1) {
            let name: String = call.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.starts_with(|c: char| c.is_ascii_uppercase()) {
                called.insert(format!("cu{name}"));
            }
        }
    }
    let looked_for = library::DRIVER_FUNCTIONS
        .iter()
        .chain([&library::PARAM_INFO, &library::VERSION])
        .map(|name| (*name).to_owned())
        .collect();
    assert_eq!(called, looked_for);
}

/// With NVRTC, which needs no device: set `TIDEMILL_CUDA_LIBRARIES` to the folder that `scripts/cuda.sh libraries`
/// prints. `scripts/gpu_tests.sh` runs this with a device.
#[test]
fn every_source_compiles_at_run_time() {
    let folder = tempfile::tempdir().unwrap();
    let cache = crate::gpu::image::ImageCache::at(folder.path());
    let image = |source: &Source, capability| nvrtc::image(&cache, source, capability, 13000);
    if !library::has_nvrtc() {
        let error = image(&SOURCES[0], (9, 0)).unwrap_err();
        assert!(error.to_string().contains("NVRTC is not installed"), "{error}");
        return missing(&error.to_string());
    }
    for source in SOURCES {
        let capabilities: &[(i32, i32)] =
            if source.name.ends_with("_hopper") { &[(9, 0)] } else { &[(8, 0), (9, 0), (12, 9)] };
        for &capability in capabilities {
            let first = image(source, capability).unwrap();
            assert_eq!(image(source, capability).unwrap(), first, "from the cache");
        }
    }
    let broken = Source { name: "broken", text: "#include \"types.cuh\"\nint f( {\n", image: None };
    let error = image(&broken, (9, 0)).unwrap_err().to_string();
    assert!(error.contains("broken.cu(2)"), "{error}");
}

#[test]
fn products_are_described_to_cublas() {
    if library::has_cublas_lt() {
        gemm::tests::describe_all();
    } else {
        missing(&CudaError::NoCublasLt.to_string());
    }
}

/// Runs tests of this program in another one, which finds the fake libraries.
fn with_fake_driver(mode: &str, tests: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcublasLt.so", "libnvrtc.so"] {
        std::os::unix::fs::symlink(tidemill_cuda_emulation::FAKE_DRIVER, folder.path().join(name)).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(tests)
        .env(FAKE_DRIVER_VARIABLE, mode)
        .env("LD_LIBRARY_PATH", folder.path())
        .env("TIDEMILL_CACHE", folder.path().join("cache"))
        .env_remove(library::FOLDERS_VARIABLE)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{mode}: {said}{}", String::from_utf8_lossy(&output.stderr));
    let images = std::fs::read_dir(folder.path().join("cache/images")).map_or(0, Iterator::count);
    format!("{said}{images} images kept\n")
}

/// The device does over cudarc and a driver what the emulation does.
#[test]
fn the_driver_is_used_as_it_must_be() {
    if cfg!(feature = "cuda-tests") {
        return;
    }
    let modules =
        ["device", "gemm", "model", "rms_norm", "scale_outer"].map(|name| format!("gpu::tests::{name}::"));
    let tests: Vec<&str> = modules.iter().map(String::as_str).collect();
    let said = with_fake_driver("take", &tests);
    assert!(said.contains("a_graph_does_again_what_was_recorded ... ok"), "{said}");
    // A driver that takes no embedded image: the sources are compiled, and kept for the next start.
    let said = with_fake_driver("refuse", &["gpu::tests::device::", "gpu::tests::rms_norm::"]);
    assert!(said.contains("\n1 images kept"), "{said}");
}
