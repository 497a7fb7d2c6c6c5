//! Compiles every kernel over the emulation with the C++ compiler of the system.
//!
//! `TIDEMILL_EMULATION_ASAN=1` builds for AddressSanitizer; run the tests with its library preloaded then.

use std::path::{Path, PathBuf};

fn main() {
    let kernels = Path::new("../cuda");
    for path in [kernels, Path::new("emu.h"), Path::new("emu.cpp"), Path::new("driver.cpp")] {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rerun-if-env-changed=TIDEMILL_EMULATION_ASAN");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(kernels)
        .expect("the kernels are beside the emulation")
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false);
    build.flag("-xc++").flag("-fno-strict-aliasing").flag("-Wno-psabi").include(".").include(kernels);
    let sanitized = std::env::var_os("TIDEMILL_EMULATION_ASAN").is_some();
    if sanitized {
        build.flag("-fsanitize=address").flag("-g");
    }
    let mut library = build.get_compiler().to_command();
    build.file("emu.cpp").files(sources).cargo_metadata(false).compile("cuda_emulation");
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    // The same kernels behind a driver, found in place of the real one: nothing but the driver's names is seen.
    library.args([
        "-shared",
        "-fvisibility=hidden",
        "driver.cpp",
        "-xnone",
        "-Wl,-Bsymbolic",
        "-Wl,--whole-archive",
    ]);
    library.args([&format!("{out}/libcuda_emulation.a"), "-Wl,--no-whole-archive", "-pthread", "-o"]);
    let linked = library.arg(format!("{out}/libfakecuda.so")).status();
    assert!(linked.is_ok_and(|status| status.success()), "the fake driver does not link");
    println!("cargo:rustc-link-search=native={out}");
    // Kernels are found by name, so the linker must not drop the objects that nothing refers to.
    println!("cargo:rustc-link-lib=static:+whole-archive=cuda_emulation");
    println!("cargo:rustc-link-lib=stdc++");
    if sanitized {
        println!("cargo:rustc-link-lib=asan");
    }
}
