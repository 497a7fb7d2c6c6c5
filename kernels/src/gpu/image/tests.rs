//! What nvcc made of the kernels: no spills, nothing on a stack, and the instructions that a source counts on.
//!
//! A source says so in a line `// SASS: HGMMA UTMALDG`, or `// SASS sm_90a: HGMMA` for one architecture; it must where it
//! calls what `WRAPPERS` lists. Each of its kernels has to have them.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::gpu::tests::sources;

#[test]
fn every_file_is_embedded() {
    let folder = sources().join("kernels/cuda");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|file| file.ends_with(".cu") || file.ends_with(".cuh"))
        .collect();
    files.sort();
    let sources = SOURCES.iter().map(|source| format!("{}.cu", source.name));
    let mut embedded: Vec<String> = sources.chain(HEADERS.iter().map(|header| header.0.to_owned())).collect();
    embedded.sort();
    assert_eq!(embedded, files);
    assert!(Source::named("rms_norm").unwrap().text.contains("rms_norm("));
    assert!(Source::named("no_such_kernel").is_none());
}

#[test]
fn headers_of_headers_are_found() {
    let source = Source { name: "new", text: "#include \"hopper.cuh\"\n", image: None };
    let names: Vec<&str> = source.headers().iter().map(|header| header.0).collect();
    assert_eq!(names, ["hopper.cuh", "ptx.cuh", "types.cuh"]);
}

/// Whether there is an nvcc; without one the tests say so, and pass only where that is meant.
fn has_nvcc() -> bool {
    let is_meant = std::env::var_os("TIDEMILL_NO_NVCC").is_some();
    assert!(
        NVCC.is_some() || is_meant,
        "the kernels were built without nvcc: run `sh scripts/cuda.sh fetch`, or set TIDEMILL_NO_NVCC=1"
    );
    if NVCC.is_none() {
        eprintln!("TIDEMILL_NO_NVCC: the assembly of the kernels is not looked at");
    }
    NVCC.is_some()
}

/// Breaches of the rules in a report of ptxas.
fn breaches(report: &str) -> Vec<String> {
    let mut kernel = String::new();
    let mut breaches = Vec::new();
    let mut num_properties = 0;
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function ") {
            kernel = name.to_owned();
        }
        if line.contains("spill stores") {
            num_properties += 1;
            let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            if line.trim() != clean {
                breaches.push(format!("{kernel}: {}", line.trim()));
            }
        }
        if line.contains("Potential Performance Loss") {
            breaches.push(format!("{kernel}: {line}"));
        }
    }
    if num_properties == 0 {
        breaches.push(format!("a report without kernels: {report}"));
    }
    breaches
}

/// Architecture and instruction of each promise in a source.
fn promises<'a>(source: &'a Source, architectures: &[&'a str]) -> Vec<(&'a str, &'a str)> {
    let mut promises = Vec::new();
    for line in source.text.lines().filter_map(|line| line.trim().strip_prefix("// SASS")) {
        let (only, instructions) = line.split_once(':').expect("`// SASS: NAMES`");
        for &architecture in
            architectures.iter().filter(|&&name| only.trim().is_empty() || only.trim() == name)
        {
            promises.extend(instructions.split_whitespace().map(|name| (architecture, name)));
        }
    }
    promises
}

/// Calls of a source, and the instruction that it counts on then.
const WRAPPERS: [(&str, &str); 5] = [
    (" mma<T>(", "HMMA"),
    ("ldmatrix_x4<", "LDSM"),
    ("cp_async16(", "LDGSTS"),
    ("wgmma_64x128<T>(", "HGMMA"),
    ("tma_load_2d(", "UTMALDG"),
];

/// Architecture, kernel and its code, of all in an image.
fn disassemble(nvcc: &str, image: &str) -> Vec<(String, String, String)> {
    let folder = Path::new(nvcc).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).unwrap();
    let output = Command::new("cuobjdump").args(["-sass", image]).env("PATH", path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{image}: {}", String::from_utf8_lossy(&output.stderr));
    let parts = text.split("\tcode for ").skip(1).filter_map(|part| part.split_once('\n'));
    let kernels = |(architecture, code): (&str, &str)| {
        let kernels = code.split("\tFunction : ").skip(1).filter_map(|part| part.split_once('\n'));
        let architecture = architecture.trim().to_owned();
        let named = kernels.map(|(name, code)| (architecture.clone(), name.trim().into(), code.into()));
        named.collect::<Vec<_>>()
    };
    parts.flat_map(kernels).collect()
}

#[test]
fn sources_promise_what_they_call() {
    for (call, _) in WRAPPERS {
        assert!(
            SOURCES.iter().any(|source| source.text.contains(call)),
            "nobody calls {call}: was it renamed?"
        );
    }
    for source in SOURCES {
        let promised = promises(source, &["any", "sm_80", "sm_90a"]);
        for (call, instruction) in WRAPPERS.into_iter().filter(|(call, _)| source.text.contains(call)) {
            let is_promised = promised.iter().any(|promise| promise.1 == instruction);
            assert!(is_promised, "{}.cu calls {call} and does not promise {instruction}", source.name);
        }
    }
}

#[test]
fn kernels_keep_to_their_registers() {
    if !has_nvcc() {
        return;
    }
    assert_eq!(REPORTS.len(), SOURCES.len());
    let mut all = Vec::new();
    for (image, report) in REPORTS {
        let report = std::fs::read_to_string(report).unwrap();
        all.extend(breaches(&report).into_iter().map(|breach| format!("{image}: {breach}")));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn kernels_have_the_instructions_that_they_promise() {
    let Some(nvcc) = NVCC.filter(|_| has_nvcc()) else { return };
    for (source, (image, _)) in SOURCES.iter().zip(REPORTS) {
        let architectures: &[&str] =
            if source.name.ends_with("_hopper") { &["sm_90a"] } else { &["sm_80", "sm_90a"] };
        let code = disassemble(nvcc, image);
        for architecture in architectures {
            let has_it = code.iter().any(|(name, ..)| name == architecture);
            assert!(has_it, "{image} has no code for {architecture}");
        }
        let promises = promises(source, architectures);
        for (architecture, kernel, code) in &code {
            let has = |instruction| code.split_whitespace().any(|word| is_instruction(word, instruction));
            for (_, instruction) in promises.iter().filter(|promise| promise.0 == architecture) {
                assert!(has(instruction), "{kernel} has no {instruction} for {architecture}");
            }
            // Products are of the numbers that the kernel is named for.
            let mut products = code
                .split_whitespace()
                .filter(|word| is_instruction(word, "HMMA") || is_instruction(word, "HGMMA"));
            let is_bf16 = kernel.ends_with("_bf16");
            assert!(products.all(|word| word.contains("BF16") == is_bf16), "{kernel} multiplies others");
        }
    }
}

/// What attention for Hopper is fast by: the assembler has moved the second wait before the exponentials once.
#[test]
fn weights_are_made_while_values_are_multiplied() {
    let Some(nvcc) = NVCC.filter(|_| has_nvcc()) else { return };
    let (_, (image, _)) =
        SOURCES.iter().zip(REPORTS).find(|(source, _)| source.name == "attention_hopper").unwrap();
    for (_, kernel, code) in disassemble(nvcc, image) {
        let (_, behind) = code.split_once("WARPGROUP.DEPBAR.LE gsb0, 0x1").unwrap();
        let (between, _) = behind.split_once("WARPGROUP.DEPBAR.LE gsb0, 0x0").unwrap();
        // Of 128 keys a thread has 32 for each of its two rows.
        let num_exponentials = between.matches("MUFU.EX2").count();
        assert!(num_exponentials >= 64, "{kernel}: {num_exponentials} exponentials before the wait");
    }
}

/// `HMMA.16816.F32.BF16` is an `HMMA`.
fn is_instruction(word: &str, instruction: &str) -> bool {
    word.strip_prefix(instruction).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', ';']))
}

#[test]
fn a_bad_report_is_seen() {
    let report = "ptxas info    : Compiling entry function 'f' for 'sm_80'\n\
        \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
    assert!(breaches(report).is_empty());
    let spilled = report.replace("0 bytes spill stores", "8 bytes spill stores");
    assert_eq!(
        breaches(&spilled),
        ["'f' for 'sm_80': 0 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads"]
    );
    assert_eq!(breaches("").len(), 1);
    let lost = format!("{report}ptxas info : (C7510) Potential Performance Loss: wgmma\n");
    assert_eq!(breaches(&lost).len(), 1);
    let source = Source { name: "new", text: "// SASS: A B\n// SASS sm_80: C\n", image: None };
    assert_eq!(
        promises(&source, &["sm_80", "x"]),
        [("sm_80", "A"), ("sm_80", "B"), ("x", "A"), ("x", "B"), ("sm_80", "C")]
    );
    assert!(is_instruction("HMMA.16816.F32.BF16", "HMMA") && !is_instruction("HMMAX", "HMMA"));
}

#[test]
fn images_are_kept_and_broken_ones_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = ImageCache::at(&folder.path().join("images"));
    let mut num_made = 0;
    let mut get = |parts: &[&str]| {
        let made = |image: &str| Ok::<_, ()>(image.as_bytes().to_vec());
        let make = || {
            num_made += 1;
            made(&parts.concat())
        };
        (cache.get_or_make(parts, make).unwrap(), num_made)
    };
    assert_eq!(get(&["a", "bc"]), (b"abc".to_vec(), 1));
    assert_eq!(get(&["a", "bc"]), (b"abc".to_vec(), 1));
    assert_eq!(get(&["ab", "c"]), (b"abc".to_vec(), 2), "parts are told apart");
    let files =
        || std::fs::read_dir(folder.path().join("images")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(files().count(), 2, "nothing is left over");
    for broken in [&b"short"[..], &[0; 40]] {
        files().for_each(|file| std::fs::write(file, broken).unwrap());
        let before = get(&["a", "bc"]).1;
        assert_eq!(get(&["a", "bc"]), (b"abc".to_vec(), before), "made once more and kept");
    }
    assert_eq!(get(&["a", "bc"]).1, 4);
    // A folder that cannot be made.
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let image = ImageCache::at(&file).get_or_make(&["x"], || Ok::<_, ()>(vec![1]));
    assert_eq!(image, Ok(vec![1]));
}
