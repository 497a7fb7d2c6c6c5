//! Compiles the kernels of `cuda/` ahead of time where there is an nvcc, and writes the table that embeds them.
//!
//! The nvcc is that of `TIDEMILL_NVCC`, of the cache (`scripts/cuda.sh`) or of the `PATH`; none where
//! `TIDEMILL_NO_NVCC` is set. Without one the table has sources alone, and they are compiled when the program runs.
//! Images are kept in `target/cuda` under a hash of all that they are made of, so profiles share them and only what
//! changed is compiled. What nvcc says of registers and spills lies beside each for the test of the assembly.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where `scripts/cuda.sh` puts it, below the cache.
const FETCHED: &str = "cuda/13.0.88/nvidia/cu13/bin/nvcc";
const FLAGS: [&str; 5] = ["-O3", "-std=c++17", "--fatbin", "-Xptxas=-v", "-Xfatbin=-compress-all"];
/// Machine code for the A100's generation, and the same in a form that drivers of later ones compile.
const AMPERE: &str = "-gencode=arch=compute_80,code=[compute_80,sm_80]";
const HOPPER: &str = "-gencode=arch=compute_90a,code=sm_90a";

struct Nvcc {
    program: PathBuf,
    version: String,
}

/// A kernel's source and what came of it.
struct Source {
    name: String,
    path: PathBuf,
    /// Image and report.
    compiled: Option<(PathBuf, PathBuf)>,
}

fn main() {
    for name in ["TIDEMILL_NVCC", "TIDEMILL_NO_NVCC", "TIDEMILL_CACHE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=cuda");
    let folder = fs::canonicalize("cuda").unwrap_or_else(|error| fail(&format!("cannot find cuda: {error}")));
    let texts = texts(&folder);
    let mut sources: Vec<Source> = texts
        .keys()
        .filter_map(|file| Some((file.strip_suffix(".cu")?, file)))
        .map(|(name, file)| Source { name: name.to_owned(), path: folder.join(file), compiled: None })
        .collect();
    let nvcc = find_nvcc();
    if let Some(nvcc) = &nvcc {
        compile_all(nvcc, &texts, &mut sources);
    }
    let headers = texts.keys().filter(|file| file.ends_with(".cuh")).map(|file| folder.join(file));
    write_table(nvcc.as_ref(), &sources, headers);
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    exit(1);
}

/// The files of the folder by name.
fn texts(folder: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| fail(&format!("cannot read cuda: {error}")));
    let read = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        let is_source = name.ends_with(".cu") || name.ends_with(".cuh");
        is_source.then(|| match fs::read_to_string(&path) {
            Ok(text) => (name, text),
            Err(error) => fail(&format!("cannot read {}: {error}", path.display())),
        })
    };
    entries.filter_map(Result::ok).filter_map(|entry| read(entry.path())).collect()
}

fn find_nvcc() -> Option<Nvcc> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    if set("TIDEMILL_NO_NVCC").is_some() {
        return None;
    }
    if let Some(program) = set("TIDEMILL_NVCC").map(PathBuf::from) {
        println!("cargo:rerun-if-changed={}", program.display());
        let version = version(&program);
        let problem = || fail(&format!("TIDEMILL_NVCC={} cannot be run", program.display()));
        return Some(Nvcc { version: version.unwrap_or_else(problem), program });
    }
    let cache = set("TIDEMILL_CACHE")
        .map(PathBuf::from)
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| Path::new(&folder).join("tidemill")))
        .or_else(|| set("HOME").map(|folder| Path::new(&folder).join(".cache/tidemill")));
    let fetched = cache.map(|cache| cache.join(FETCHED));
    if let Some(program) = fetched.as_ref().filter(|program| program.is_file()) {
        println!("cargo:rerun-if-changed={}", program.display());
    } else if let Some(folder) = fetched.as_ref().and_then(|program| program.ancestors().nth(5)) {
        // A file that is not there would make every build anew; the folder changes when nvcc is fetched.
        if fs::create_dir_all(folder).is_ok() {
            println!("cargo:rerun-if-changed={}", folder.display());
        }
    }
    let on_path = set("PATH").map(|path| env::split_paths(&path).map(|folder| folder.join("nvcc")).collect());
    let on_path: Vec<PathBuf> = on_path.unwrap_or_default();
    fetched
        .into_iter()
        .chain(on_path)
        .filter(|program| program.is_file())
        .find_map(|program| version(&program).map(|version| Nvcc { program, version }))
}

/// Of an nvcc that knows Hopper.
fn version(program: &Path) -> Option<String> {
    let output =
        Command::new(program).arg("--version").output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let major: u32 = text.split_once("release ")?.1.split('.').next()?.parse().ok()?;
    if major < 12 {
        println!("cargo:warning={} is CUDA {major}, 12 or newer is needed", program.display());
        return None;
    }
    Some(text)
}

/// As many at a time as cargo may have jobs.
fn compile_all(nvcc: &Nvcc, texts: &BTreeMap<String, String>, sources: &mut [Source]) {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_else(|| fail("cargo sets OUT_DIR")));
    // OUT_DIR is target/PROFILE/build/NAME/out.
    let images = out.ancestors().nth(4).unwrap_or(&out).join("cuda");
    fs::create_dir_all(&images).unwrap_or_else(|error| fail(&format!("cannot make {images:?}: {error}")));
    let num_jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((source.name.clone(), compile(nvcc, texts, source, &images)));
        }
        done
    };
    let done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_jobs.clamp(1, 16)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|_| fail("a panic"))).collect()
    });
    let mut errors = String::new();
    for (name, result) in done {
        match result {
            Ok(compiled) => {
                let source = sources.iter_mut().find(|source| source.name == name);
                source.into_iter().for_each(|source| source.compiled = Some(compiled.clone()));
            }
            Err(error) => errors += &error,
        }
    }
    if !errors.is_empty() {
        fail(&errors);
    }
}

/// Image and report of a source.
fn compile(
    nvcc: &Nvcc,
    texts: &BTreeMap<String, String>,
    source: &Source,
    images: &Path,
) -> Result<(PathBuf, PathBuf), String> {
    let mut flags: Vec<&str> = FLAGS.to_vec();
    if !source.name.ends_with("_hopper") {
        flags.push(AMPERE);
    }
    flags.push(HOPPER);
    let mut hasher = DefaultHasher::new();
    (&nvcc.version, &flags).hash(&mut hasher);
    let mut included = vec![format!("{}.cu", source.name)];
    let mut i = 0;
    while let Some(text) = included.get(i).and_then(|file| texts.get(file)) {
        text.hash(&mut hasher);
        let names = text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
        let new: Vec<&str> = names.filter(|name| texts.contains_key(*name)).collect();
        for name in new {
            if !included.iter().any(|file| file == name) {
                included.push(name.to_owned());
            }
        }
        i += 1;
    }
    let stem = format!("{}-{:016x}", source.name, hasher.finish());
    let (image, report) = (images.join(format!("{stem}.fatbin")), images.join(format!("{stem}.log")));
    if image.is_file() && report.is_file() {
        return Ok((image, report));
    }
    let new = images.join(format!("{stem}.{}", std::process::id()));
    let output = Command::new(&nvcc.program)
        .args(&flags)
        .arg("-o")
        .args([&new, &source.path])
        .output()
        .map_err(|error| format!("cannot run {}: {error}\n", nvcc.program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{} does not compile with nvcc:\n{said}\n", source.path.display()));
    }
    for line in said.lines().filter(|line| line.contains("warning")) {
        println!("cargo:warning={line}");
    }
    let write = || {
        fs::write(&report, said.as_bytes())?;
        fs::rename(&new, &image)
    };
    write().map_err(|error| format!("cannot write {}: {error}\n", image.display()))?;
    Ok((image, report))
}

/// `SOURCES`, `HEADERS`, and for the tests how the images were made.
fn write_table(nvcc: Option<&Nvcc>, sources: &[Source], headers: impl Iterator<Item = PathBuf>) {
    let mut table = String::from("pub(crate) const SOURCES: &[Source] = &[\n");
    for Source { name, path, compiled } in sources {
        let image = compiled.as_ref().map(|(image, _)| format!("include_bytes!({image:?})"));
        let image = image.map_or("None".to_owned(), |image| format!("Some({image})"));
        let _ =
            writeln!(table, "    Source {{ name: {name:?}, text: include_str!({path:?}), image: {image} }},");
    }
    table += "];\npub(crate) const HEADERS: &[(&str, &str)] = &[\n";
    for path in headers {
        let name = path.file_name().unwrap_or_default();
        let _ = writeln!(table, "    ({name:?}, include_str!({path:?})),");
    }
    table += "];\n#[cfg(test)]\npub(crate) const NVCC: Option<&str> = ";
    let _ = writeln!(table, "{:?};", nvcc.map(|nvcc| &nvcc.program));
    table += "/// Image and report of each source.\n#[cfg(test)]\npub(crate) const REPORTS: &[(&str, &str)] = &[\n";
    for (image, report) in sources.iter().filter_map(|source| source.compiled.as_ref()) {
        let _ = writeln!(table, "    ({image:?}, {report:?}),");
    }
    table += "];\n";
    let out = env::var_os("OUT_DIR").unwrap_or_else(|| fail("cargo sets OUT_DIR"));
    let path = Path::new(&out).join("images.rs");
    if fs::read_to_string(&path).is_ok_and(|old| old == table) {
        return;
    }
    fs::write(&path, table).unwrap_or_else(|error| fail(&format!("cannot write {path:?}: {error}")));
}
