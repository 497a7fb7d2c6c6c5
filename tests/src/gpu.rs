//! Where tests of GPUs find one: the CUDA device with `--features cuda-tests`, else a driver that runs kernels on the
//! CPU (`kernels/emulation/driver.cpp`), which is found under the names of NVIDIA's libraries.

use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;
use tidemill_cuda_emulation::FAKE_DRIVER;

/// Says that this process was started beside the fake driver.
const IN_CHILD: &str = "TIDEMILL_FAKE_DRIVER";

/// A folder with the fake libraries, and a cache of compiled kernels.
pub struct FakeDriver {
    folder: TempDir,
}

impl FakeDriver {
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        for name in ["libcuda.so", "libcublasLt.so", "libnvrtc.so"] {
            symlink(FAKE_DRIVER, folder.path().join(name))?;
        }
        Ok(Self { folder })
    }

    /// Lets a program find it.
    pub fn serve(&self, program: &mut Command) {
        program.env("LD_LIBRARY_PATH", self.folder.path()).env_remove("TIDEMILL_CUDA_LIBRARIES");
    }
}

/// Runs a test where there is a GPU: here, or in this program started again beside the fake driver. `name` is the test's.
pub fn on_gpu(name: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    if cfg!(feature = "cuda-tests") || std::env::var_os(IN_CHILD).is_some() {
        return test();
    }
    let driver = FakeDriver::new()?;
    let mut again = Command::new(std::env::current_exe()?);
    driver.serve(again.args(["--exact", name, "--nocapture"]).env(IN_CHILD, "1"));
    let output = again.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.contains("1 passed"), "no test {name}: {said}");
    print!("{said}");
    Ok(())
}
