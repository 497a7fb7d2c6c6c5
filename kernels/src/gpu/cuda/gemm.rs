//! Matrix products by cuBLASLt, with plans that are made once.
//!
//! cuBLASLt counts columns first: our row-major `out[m, n]` is its `n × m`, made of `weight` transposed and `x` as they
//! lie. A plan has the descriptors and the algorithm for a range of `m`, so a step makes none after the first of its
//! shape. Where a row must not depend on the batch, there is one plan for every `m`, whose algorithm adds each sum up in
//! one piece and in one order. Numbers of e4m3 have a scale for each row of `x` and of `weight`; where cuBLASLt cannot
//! apply these (before Hopper, or before cuBLAS 12.9), the plain product is scaled by a kernel afterwards.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::cublaslt::sys::{
    self, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t,
    cublasStatus_t, cudaDataType_t,
};
use cudarc::driver::sys::CUstream;

use super::driver::{Relaxed, failed};
use crate::gpu::device::{Address, DeviceError, Gemm, GemmInput, GemmOutput};
use crate::gpu::ops::UNSCALED_F16;

/// As much as cuBLASLt wants on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Operands begin at multiples of this.
const ALIGN: u64 = 16;
/// The same where a row must not depend on the batch: sums in several pieces need more.
const INVARIANT_WORKSPACE_BYTES: usize = 1 << 10;
/// Algorithms to choose from: the first need not do what it promised, and few are invariant.
const NUM_CANDIDATES: usize = 8;
const NUM_INVARIANT_CANDIDATES: usize = 64;
/// Sums in several pieces are added up as f32, in an order that is always the same.
const REDUCTION_AS_F32: u32 = 2;
/// A sum of other lengths is not cut: libraries have been reported that lose what is behind the last whole piece.
const WHOLE_PIECE: usize = 128;
/// Numbers of rows that the one algorithm for all must be able to do, and the one that it is chosen for.
const INVARIANT_M: [usize; 5] = [1, 17, MIDDLING_M, 2048, 8192];
const MIDDLING_M: usize = 256;

/// Of e4m3, after the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scaling {
    Done,
    /// By the caller.
    Left,
}

#[derive(Debug)]
pub(super) struct Gemms {
    /// Null before the start.
    handle: cublasLtHandle_t,
    workspace: Address,
    plans: BTreeMap<Key, Plan>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    n: usize,
    k: usize,
    input: GemmInput,
    output: GemmOutput,
    rows: Rows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rows {
    /// Of any number, a row as if it were alone.
    All,
    /// Up to this number, from that of the bucket below on.
    UpTo(usize),
    Exactly(usize),
}

#[derive(Debug)]
struct Plan {
    shape: Shape,
    algorithm: cublasLtMatmulAlgo_t,
    max_workspace_bytes: usize,
    /// Whether the algorithm can do so many rows, where it was asked.
    checked: BTreeMap<usize, bool>,
}

/// Descriptors, destroyed with this.
#[derive(Debug)]
struct Shape {
    product: cublasLtMatmulDesc_t,
    weight: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    out: cublasLtMatrixLayout_t,
    /// That the layouts are set to.
    m: usize,
    scaling: Scaling,
    /// That the descriptor has.
    scales: [Address; 2],
}

impl Default for Gemms {
    fn default() -> Self {
        Self { handle: null_mut(), workspace: Address::NULL, plans: BTreeMap::new() }
    }
}

/// Rounded up so that there are four buckets from one power of two to the next.
fn bucket(m: usize) -> usize {
    if m <= 8 {
        return m;
    }
    let step = 1 << (m.ilog2() - 2);
    m.next_multiple_of(step)
}

fn workspace_bytes(rows: Rows) -> usize {
    match rows {
        Rows::All => INVARIANT_WORKSPACE_BYTES,
        Rows::UpTo(_) | Rows::Exactly(_) => WORKSPACE_BYTES,
    }
}

fn check(what: &str, status: cublasStatus_t) -> Result<(), DeviceError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        _ => Err(failed(what, format!("{status:?}"))),
    }
}

fn what(gemm: &Gemm) -> String {
    let Gemm { m, n, k, input, output, .. } = gemm;
    format!("multiply [{m}, {k}] by [{n}, {k}] from {input:?} to {output:?}")
}

impl Gemms {
    /// The library was found to be there, and the context is the thread's.
    pub(super) fn start(&mut self, workspace: Address) -> Result<(), DeviceError> {
        self.workspace = workspace;
        // SAFETY: the library is there, the caller says so; the pointer is to a handle.
        check("start cuBLASLt", unsafe { sys::cublasLtCreate(&mut self.handle) })?;
        // SAFETY: as above.
        tracing::info!(version = unsafe { sys::cublasLtGetVersion() }, "cuBLASLt is loaded");
        Ok(())
    }

    /// Gives the workspace back. The context is the thread's, and what was queued is done.
    pub(super) fn stop(&mut self) -> Address {
        self.plans.clear();
        let handle = std::mem::replace(&mut self.handle, null_mut());
        if !handle.is_null() {
            // SAFETY: it was created and is destroyed once.
            unsafe { sys::cublasLtDestroy(handle) };
        }
        std::mem::replace(&mut self.workspace, Address::NULL)
    }

    /// Queues the product, scaled or not.
    ///
    /// # Safety
    /// The operands are of the shapes given and stay valid until the work is done; the context is the thread's.
    pub(super) unsafe fn multiply(&mut self, stream: CUstream, gemm: &Gemm) -> Result<Scaling, DeviceError> {
        assert!(gemm.m > 0 && gemm.n > 0 && gemm.k > 0, "{gemm:?}");
        for operand in [gemm.x, gemm.weight, gemm.out] {
            assert!(operand.0.is_multiple_of(ALIGN), "{}: an operand begins at {operand:?}", what(gemm));
        }
        let key = self.plan(gemm)?;
        // SAFETY: the caller says so.
        match unsafe { self.run(stream, gemm, key)? } {
            Ok(scaling) => Ok(scaling),
            // The library may promise scales for rows and then refuse the product, for some shapes.
            Err(status) if gemm.input == GemmInput::E4m3 && self.is_scaled(key) => {
                tracing::debug!(product = what(gemm), ?status, "cuBLASLt does not apply the scales");
                let plan = self.make_plan(gemm, key.rows, &[Scaling::Left])?;
                self.plans.insert(key, plan);
                let key = self.plan(gemm)?;
                // SAFETY: as above.
                unsafe { self.run(stream, gemm, key)? }
                    .map_err(|status| failed(&what(gemm), format!("{status:?}")))
            }
            Err(status) => Err(failed(&what(gemm), format!("{status:?}"))),
        }
    }

    fn is_scaled(&self, key: Key) -> bool {
        self.plans.get(&key).is_some_and(|plan| plan.shape.scaling == Scaling::Done)
    }

    /// Queues the product by a plan; the inner error is the library's.
    ///
    /// # Safety
    /// As for `multiply`.
    unsafe fn run(
        &mut self,
        stream: CUstream,
        gemm: &Gemm,
        key: Key,
    ) -> Result<Result<Scaling, cublasStatus_t>, DeviceError> {
        let (handle, workspace) = (self.handle, self.workspace);
        let plan = self.plans.get_mut(&key).ok_or_else(|| failed(&what(gemm), "it was not planned"))?;
        plan.shape.set_scales(gemm)?;
        let alpha = match (plan.shape.scaling, gemm.output) {
            (Scaling::Left, GemmOutput::F16) => UNSCALED_F16,
            _ => 1.0,
        };
        let beta = 0.0f32;
        let (weight, x) = (gemm.weight.0 as *const c_void, gemm.x.0 as *const c_void);
        let out = gemm.out.0 as *mut c_void;
        let shape = &plan.shape;
        // SAFETY: the descriptors are those of the shape given, the algorithm was checked for it, the workspace has
        // the size given and is used in the order of the stream; the caller answers for the operands.
        let status = unsafe {
            sys::cublasLtMatmul(
                handle,
                shape.product,
                (&raw const alpha).cast(),
                weight,
                shape.weight,
                x,
                shape.x,
                (&raw const beta).cast(),
                out,
                shape.out,
                out,
                shape.out,
                &plan.algorithm,
                workspace.0 as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        Ok(match status {
            cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(shape.scaling),
            status => Err(status),
        })
    }

    /// The plan for the product, set to its rows.
    fn plan(&mut self, gemm: &Gemm) -> Result<Key, DeviceError> {
        let Gemm { m, n, k, input, output, .. } = *gemm;
        let key = |rows| Key { n, k, input, output, rows };
        let keys = match gemm.batch_invariant {
            true => [Some(key(Rows::All)), None],
            false => [Some(key(Rows::UpTo(bucket(m)))), Some(key(Rows::Exactly(m)))],
        };
        let scalings: &[Scaling] = match input {
            GemmInput::Bf16 | GemmInput::F16 => &[Scaling::Done],
            GemmInput::E4m3 => &[Scaling::Done, Scaling::Left],
        };
        for key in keys.into_iter().flatten() {
            if !self.plans.contains_key(&key) {
                let plan = self.make_plan(gemm, key.rows, scalings)?;
                self.plans.insert(key, plan);
            }
            let handle = self.handle;
            let plan = self.plans.get_mut(&key);
            if plan.is_some_and(|plan| plan.can_do(handle, m)) {
                return Ok(key);
            }
        }
        Err(failed(&what(gemm), "its algorithm cannot do so many rows"))
    }

    /// The first algorithm that does it, with scales applied in the first way that works.
    fn make_plan(&self, gemm: &Gemm, rows: Rows, scalings: &[Scaling]) -> Result<Plan, DeviceError> {
        let _relaxed = Relaxed::new();
        let m = match rows {
            Rows::All => MIDDLING_M,
            Rows::UpTo(m) | Rows::Exactly(m) => m,
        };
        for &scaling in scalings {
            let mut shape = Shape::new(gemm, m, scaling)?;
            // A library that does not know scales for rows refuses the descriptor, others the algorithm.
            if shape.set_scales(gemm).is_err() {
                continue;
            }
            for algorithm in self.algorithms(gemm, &shape, rows)? {
                let max_workspace_bytes = workspace_bytes(rows);
                let mut plan = Plan { shape, algorithm, max_workspace_bytes, checked: BTreeMap::new() };
                let is_fit = match rows {
                    Rows::All => plan.is_invariant(self.handle)?,
                    Rows::UpTo(_) | Rows::Exactly(_) => plan.can_do(self.handle, m),
                };
                if is_fit {
                    return Ok(plan);
                }
                shape = plan.shape;
            }
        }
        let reason = match gemm.input {
            GemmInput::Bf16 | GemmInput::F16 => "cuBLASLt has no algorithm for it",
            GemmInput::E4m3 => {
                "cuBLASLt has no algorithm for it (compute capability 8.9 and multiples of 16 are needed)"
            }
        };
        Err(failed(&what(gemm), reason))
    }

    /// Best first; none if the library has none.
    fn algorithms(
        &self,
        gemm: &Gemm,
        shape: &Shape,
        rows: Rows,
    ) -> Result<Vec<cublasLtMatmulAlgo_t>, DeviceError> {
        let num_wanted = if rows == Rows::All { NUM_INVARIANT_CANDIDATES } else { NUM_CANDIDATES };
        let is_cut = rows != Rows::All && gemm.k.is_multiple_of(WHOLE_PIECE);
        let preferences = Preferences::new(workspace_bytes(rows), is_cut)?;
        // SAFETY: plain numbers and addresses, for which zeros are a value.
        let mut found: Vec<cublasLtMatmulHeuristicResult_t> = vec![unsafe { std::mem::zeroed() }; num_wanted];
        let mut num_found = 0;
        // SAFETY: the descriptors are alive, the array has the length given.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                shape.product,
                shape.weight,
                shape.x,
                shape.out,
                shape.out,
                preferences.0,
                num_wanted as i32,
                found.as_mut_ptr(),
                &mut num_found,
            )
        };
        use cublasStatus_t::{CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
        match status {
            CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_INVALID_VALUE => return Ok(Vec::new()),
            status => check(&format!("find how to {}", what(gemm)), status)?,
        }
        found.truncate(num_found.max(0) as usize);
        found.retain(|found| found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(found.into_iter().map(|found| found.algo).collect())
    }
}

impl Plan {
    /// Sets the layouts to so many rows; whether the algorithm can do them.
    fn can_do(&mut self, handle: cublasLtHandle_t, m: usize) -> bool {
        let known = self.checked.get(&m).copied();
        if known == Some(false) || self.shape.set_rows(m).is_err() {
            return false;
        }
        if known == Some(true) {
            return true;
        }
        let shape = &self.shape;
        // SAFETY: plain numbers, for which zeros are a value.
        let mut result: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptors are alive, the pointers are to an algorithm and a result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle,
                shape.product,
                shape.weight,
                shape.x,
                shape.out,
                shape.out,
                &self.algorithm,
                &mut result,
            )
        };
        let can_do = status == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && result.workspaceSize <= self.max_workspace_bytes;
        self.checked.insert(m, can_do);
        can_do
    }

    /// A row is added up in one piece, and in the same way however many there are.
    fn is_invariant(&mut self, handle: cublasLtHandle_t) -> Result<bool, DeviceError> {
        use sys::cublasLtMatmulAlgoConfigAttributes_t::{
            CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
        };
        let config = |attribute| {
            let (mut value, mut written) = (0i32, 0);
            // SAFETY: the pointers are to an algorithm and to a number of the size given.
            let status = unsafe {
                let value = (&raw mut value).cast();
                sys::cublasLtMatmulAlgoConfigGetAttribute(&self.algorithm, attribute, value, 4, &mut written)
            };
            check("tell of an algorithm", status).map(|()| value)
        };
        if config(CUBLASLT_ALGO_CONFIG_SPLITK_NUM)? > 1 || config(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)? != 0
        {
            return Ok(false);
        }
        Ok(INVARIANT_M.into_iter().all(|m| self.can_do(handle, m)))
    }
}

fn data_type(input: GemmInput) -> cudaDataType_t {
    match input {
        GemmInput::Bf16 => cudaDataType_t::CUDA_R_16BF,
        GemmInput::F16 => cudaDataType_t::CUDA_R_16F,
        GemmInput::E4m3 => cudaDataType_t::CUDA_R_8F_E4M3,
    }
}

impl Shape {
    fn new(gemm: &Gemm, m: usize, scaling: Scaling) -> Result<Self, DeviceError> {
        let what = "describe a matrix product";
        let Gemm { n, k, input, output, .. } = *gemm;
        let output = match output {
            GemmOutput::Bf16 => cudaDataType_t::CUDA_R_16BF,
            GemmOutput::F16 => cudaDataType_t::CUDA_R_16F,
            GemmOutput::F32 => cudaDataType_t::CUDA_R_32F,
        };
        let null = null_mut();
        let scales = [Address::NULL; 2];
        // What was made so far is destroyed if the next fails.
        let mut shape = Self { product: null_mut(), weight: null, x: null, out: null, m, scaling, scales };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let input = data_type(input);
        let (m, n, k) = (m as u64, n as u64, k as u64);
        // SAFETY: the library is there, or there would be no handle; the pointers are to handles.
        unsafe {
            check(
                what,
                sys::cublasLtMatmulDescCreate(&mut shape.product, compute, cudaDataType_t::CUDA_R_32F),
            )?;
            check(what, sys::cublasLtMatrixLayoutCreate(&mut shape.weight, input, k, n, k as i64))?;
            check(what, sys::cublasLtMatrixLayoutCreate(&mut shape.x, input, k, m, k as i64))?;
            check(what, sys::cublasLtMatrixLayoutCreate(&mut shape.out, output, n, m, n as i64))?;
        }
        shape.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32)?;
        if gemm.input == GemmInput::E4m3 {
            shape.set(DescAttribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1i8)?;
        }
        Ok(shape)
    }

    fn set<T: Copy>(&self, attribute: DescAttribute, value: &T) -> Result<(), DeviceError> {
        // SAFETY: the descriptor is alive, the pointer is to a value of the size given.
        let status = unsafe {
            let value = (value as *const T).cast();
            sys::cublasLtMatmulDescSetAttribute(self.product, attribute, value, size_of::<T>())
        };
        check("describe a matrix product", status)
    }

    fn set_rows(&mut self, m: usize) -> Result<(), DeviceError> {
        if self.m == m {
            return Ok(());
        }
        let columns = m as u64;
        for layout in [self.x, self.out] {
            let attribute = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
            // SAFETY: the layout is alive, the pointer is to a number of the size given.
            let status = unsafe {
                sys::cublasLtMatrixLayoutSetAttribute(layout, attribute, (&raw const columns).cast(), 8)
            };
            check("describe a matrix", status)?;
        }
        self.m = m;
        Ok(())
    }

    /// Points to the scales of this product, where cuBLASLt applies them.
    fn set_scales(&mut self, gemm: &Gemm) -> Result<(), DeviceError> {
        if gemm.input != GemmInput::E4m3 || self.scaling == Scaling::Left {
            return Ok(());
        }
        let scales = gemm.weight_scale.zip(gemm.x_scale);
        let Some((weight, x)) = scales else {
            return Err(failed(&what(gemm), "e4m3 needs scales"));
        };
        if self.scales == [Address::NULL; 2] {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            self.set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            self.set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
        }
        if self.scales != [weight, x] {
            self.set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight.0)?;
            self.set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x.0)?;
            self.scales = [weight, x];
        }
        Ok(())
    }
}

impl Drop for Shape {
    fn drop(&mut self) {
        // SAFETY: each was created and is destroyed once; null is none.
        unsafe {
            for layout in [self.weight, self.x, self.out] {
                if !layout.is_null() {
                    sys::cublasLtMatrixLayoutDestroy(layout);
                }
            }
            if !self.product.is_null() {
                sys::cublasLtMatmulDescDestroy(self.product);
            }
        }
    }
}

/// What an algorithm must keep to, destroyed with this.
struct Preferences(cublasLtMatmulPreference_t);

impl Preferences {
    /// `is_cut`: whether sums may be added up in pieces.
    fn new(workspace_bytes: usize, is_cut: bool) -> Result<Self, DeviceError> {
        let mut preferences = Self(null_mut());
        // SAFETY: the library is there, or there would be no handle; the pointer is to a handle.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preferences.0) };
        check("describe preferences", status)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(workspace_bytes as u64))?;
        for attribute in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preferences.set(attribute, &(ALIGN as u32))?;
        }
        let schemes = if is_cut { REDUCTION_AS_F32 } else { 0 };
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        Ok(preferences)
    }

    fn set<T: Copy>(&self, attribute: Preference, value: &T) -> Result<(), DeviceError> {
        // SAFETY: it is alive, the pointer is to a value of the size given.
        let status = unsafe {
            let value = (value as *const T).cast();
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, value, size_of::<T>())
        };
        check("describe preferences", status)
    }
}

impl Drop for Preferences {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created and is destroyed once.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::tests::gemm::KINDS;

    #[test]
    fn buckets_are_few_and_close() {
        let mut buckets: Vec<usize> = (1..=8192).map(bucket).collect();
        for (m, &bucket) in (1..).zip(&buckets) {
            assert!(bucket >= m && bucket * 4 <= m * 5, "{m}: {bucket}");
            assert_eq!(super::bucket(bucket), bucket, "a bucket is its own");
        }
        buckets.dedup();
        assert_eq!(buckets.len(), 8 + 4 * 10);
    }

    /// Descriptors for all kinds of products; wants the library, and no device.
    pub(in crate::gpu::cuda) fn describe_all() {
        for (input, output) in KINDS {
            let [x, weight, out] = [1, 2, 3].map(|i| Address(i << 20));
            let scales = (input == GemmInput::E4m3).then_some(Address(4 << 20));
            let (x_scale, weight_scale) = (scales, scales);
            let (m, n, k, batch_invariant) = (48, 64, 128, true);
            let gemm =
                Gemm { m, n, k, input, output, x, weight, out, x_scale, weight_scale, batch_invariant };
            let mut shape = Shape::new(&gemm, m, Scaling::Done).unwrap();
            shape.set_scales(&gemm).unwrap();
            shape.set_rows(16).unwrap();
            assert_eq!(shape.m, 16);
            assert_eq!(shape.scales[0], scales.unwrap_or(Address::NULL));
        }
        Preferences::new(INVARIANT_WORKSPACE_BYTES, false).unwrap();
        Preferences::new(WORKSPACE_BYTES, true).unwrap();
    }
}
