package sql

import (
	"fmt"
	"reflect"

	"github.com/multigres/multigres/go/common/parser/ast"
)

// The tree is walked by its Go types, so that no field of a node can be
// forgotten, and only types listed here are walked, so that no node can be
// unknown: both end in a refusal. Fields that cannot hold a name or a node
// (numbers, flags) are skipped.

// expressionNodes may appear anywhere inside a statement.
var expressionNodes = []ast.Node{
	(*ast.A_ArrayExpr)(nil), (*ast.A_Const)(nil), (*ast.A_Expr)(nil), (*ast.A_Indices)(nil), (*ast.A_Indirection)(nil),
	(*ast.A_Star)(nil), (*ast.AccessPriv)(nil), (*ast.Alias)(nil), (*ast.AlterTableCmd)(nil), (*ast.ArrayExpr)(nil), (*ast.BitString)(nil),
	(*ast.Boolean)(nil), (*ast.BooleanTest)(nil), (*ast.BoolExpr)(nil), (*ast.CTECycleClause)(nil), (*ast.CTESearchClause)(nil),
	(*ast.CaseExpr)(nil), (*ast.CaseWhen)(nil), (*ast.CoalesceExpr)(nil), (*ast.CollateClause)(nil), (*ast.ColumnDef)(nil), (*ast.ColumnRef)(nil),
	(*ast.CommonTableExpr)(nil), (*ast.Constraint)(nil), (*ast.CreateOpClassItem)(nil), (*ast.CurrentOfExpr)(nil), (*ast.DefElem)(nil),
	(*ast.Float)(nil), (*ast.FuncCall)(nil), (*ast.FunctionParameter)(nil), (*ast.GroupingFunc)(nil), (*ast.GroupingSet)(nil),
	(*ast.IndexElem)(nil), (*ast.InferClause)(nil), (*ast.Integer)(nil), (*ast.IntoClause)(nil), (*ast.JoinExpr)(nil), (*ast.KeyAction)(nil), (*ast.KeyActions)(nil),
	(*ast.LockingClause)(nil), (*ast.MergeWhenClause)(nil), (*ast.MinMaxExpr)(nil), (*ast.MultiAssignRef)(nil), (*ast.NamedArgExpr)(nil),
	(*ast.NodeList)(nil), (*ast.Null)(nil), (*ast.NullTest)(nil), (*ast.ObjectWithArgs)(nil), (*ast.OnConflictClause)(nil), (*ast.ParamRef)(nil),
	(*ast.ParenExpr)(nil), (*ast.PartitionBoundSpec)(nil), (*ast.PartitionCmd)(nil), (*ast.PartitionElem)(nil), (*ast.PartitionRangeDatum)(nil),
	(*ast.PartitionSpec)(nil), (*ast.PublicationObjSpec)(nil), (*ast.PublicationTable)(nil), (*ast.RangeFunction)(nil), (*ast.RangeSubselect)(nil),
	(*ast.RangeTableFunc)(nil), (*ast.RangeTableFuncCol)(nil), (*ast.RangeTableSample)(nil), (*ast.RangeVar)(nil), (*ast.ReplicaIdentityStmt)(nil),
	(*ast.ResTarget)(nil), (*ast.ReturnStmt)(nil), (*ast.RoleSpec)(nil), (*ast.RowExpr)(nil), (*ast.SQLValueFunction)(nil), (*ast.SetToDefault)(nil), (*ast.SortBy)(nil),
	(*ast.StatsElem)(nil), (*ast.String)(nil), (*ast.SubLink)(nil), (*ast.TableLikeClause)(nil), (*ast.TriggerTransition)(nil),
	(*ast.TypeCast)(nil), (*ast.TypeName)(nil), (*ast.VacuumRelation)(nil), (*ast.WindowDef)(nil), (*ast.WithClause)(nil),
	(*ast.XmlExpr)(nil), (*ast.XmlSerialize)(nil),
	(*ast.JsonArgument)(nil), (*ast.JsonBehavior)(nil), (*ast.JsonFormat)(nil), (*ast.JsonFuncExpr)(nil), (*ast.JsonIsPredicate)(nil),
	(*ast.JsonKeyValue)(nil), (*ast.JsonObjectConstructor)(nil), (*ast.JsonArrayConstructor)(nil), (*ast.JsonArrayQueryConstructor)(nil),
	(*ast.JsonOutput)(nil), (*ast.JsonReturning)(nil), (*ast.JsonParseExpr)(nil), (*ast.JsonScalarExpr)(nil), (*ast.JsonSerializeExpr)(nil),
	(*ast.JsonTable)(nil), (*ast.JsonTableColumn)(nil), (*ast.JsonTablePathSpec)(nil), (*ast.JsonValueExpr)(nil),
	(*ast.JsonAggConstructor)(nil), (*ast.JsonArrayAgg)(nil), (*ast.JsonObjectAgg)(nil),
}

// statementNodes are statements; analysis.statement names what each does, and
// refuses those that it does not name.
var statementNodes = []ast.Node{
	(*ast.AlterCollationStmt)(nil), (*ast.AlterCompositeTypeStmt)(nil), (*ast.AlterDatabaseRefreshCollStmt)(nil), (*ast.AlterDatabaseSetStmt)(nil),
	(*ast.AlterDatabaseStmt)(nil), (*ast.AlterDefaultPrivilegesStmt)(nil), (*ast.AlterDomainStmt)(nil), (*ast.AlterEnumStmt)(nil),
	(*ast.AlterEventTrigStmt)(nil), (*ast.AlterExtensionContentsStmt)(nil), (*ast.AlterExtensionStmt)(nil), (*ast.AlterFdwStmt)(nil),
	(*ast.AlterForeignServerStmt)(nil), (*ast.AlterFunctionStmt)(nil), (*ast.AlterObjectDependsStmt)(nil), (*ast.AlterObjectSchemaStmt)(nil),
	(*ast.AlterOpFamilyStmt)(nil), (*ast.AlterOperatorStmt)(nil), (*ast.AlterOwnerStmt)(nil), (*ast.AlterPolicyStmt)(nil),
	(*ast.AlterPublicationStmt)(nil), (*ast.AlterRoleSetStmt)(nil), (*ast.AlterRoleStmt)(nil), (*ast.AlterSeqStmt)(nil), (*ast.AlterStatsStmt)(nil),
	(*ast.AlterSubscriptionStmt)(nil), (*ast.AlterSystemStmt)(nil), (*ast.AlterTSConfigurationStmt)(nil), (*ast.AlterTSDictionaryStmt)(nil),
	(*ast.AlterTableMoveAllStmt)(nil), (*ast.AlterTableSpaceStmt)(nil), (*ast.AlterTableStmt)(nil), (*ast.AlterTypeStmt)(nil),
	(*ast.AlterUserMappingStmt)(nil), (*ast.CallStmt)(nil), (*ast.CheckPointStmt)(nil), (*ast.ClosePortalStmt)(nil), (*ast.ClusterStmt)(nil),
	(*ast.CommentStmt)(nil), (*ast.CompositeTypeStmt)(nil), (*ast.ConstraintsSetStmt)(nil), (*ast.CopyStmt)(nil), (*ast.CreateAmStmt)(nil),
	(*ast.CreateCastStmt)(nil), (*ast.CreateConversionStmt)(nil), (*ast.CreateDomainStmt)(nil), (*ast.CreateEnumStmt)(nil),
	(*ast.CreateEventTrigStmt)(nil), (*ast.CreateExtensionStmt)(nil), (*ast.CreateFdwStmt)(nil), (*ast.CreateForeignServerStmt)(nil),
	(*ast.CreateForeignTableStmt)(nil), (*ast.CreateFunctionStmt)(nil), (*ast.CreateOpClassStmt)(nil), (*ast.CreateOpFamilyStmt)(nil),
	(*ast.CreatePLangStmt)(nil), (*ast.CreatePolicyStmt)(nil), (*ast.CreatePublicationStmt)(nil), (*ast.CreateRangeStmt)(nil),
	(*ast.CreateRoleStmt)(nil), (*ast.CreateSchemaStmt)(nil), (*ast.CreateSeqStmt)(nil), (*ast.CreateStatsStmt)(nil), (*ast.CreateStmt)(nil),
	(*ast.CreateSubscriptionStmt)(nil), (*ast.CreateTableAsStmt)(nil), (*ast.CreateTableSpaceStmt)(nil), (*ast.CreateTransformStmt)(nil),
	(*ast.CreateTriggerStmt)(nil), (*ast.CreateUserMappingStmt)(nil), (*ast.CreatedbStmt)(nil), (*ast.DeallocateStmt)(nil),
	(*ast.DeclareCursorStmt)(nil), (*ast.DefineStmt)(nil), (*ast.DeleteStmt)(nil), (*ast.DiscardStmt)(nil), (*ast.DoStmt)(nil),
	(*ast.DropOwnedStmt)(nil), (*ast.DropRoleStmt)(nil), (*ast.DropStmt)(nil), (*ast.DropTableSpaceStmt)(nil), (*ast.DropUserMappingStmt)(nil),
	(*ast.DropdbStmt)(nil), (*ast.ExecuteStmt)(nil), (*ast.ExplainStmt)(nil), (*ast.FetchStmt)(nil), (*ast.GrantRoleStmt)(nil), (*ast.GrantStmt)(nil),
	(*ast.ImportForeignSchemaStmt)(nil), (*ast.IndexStmt)(nil), (*ast.InsertStmt)(nil), (*ast.ListenStmt)(nil), (*ast.LoadStmt)(nil),
	(*ast.LockStmt)(nil), (*ast.MergeStmt)(nil), (*ast.NotifyStmt)(nil), (*ast.PrepareStmt)(nil), (*ast.ReassignOwnedStmt)(nil),
	(*ast.RefreshMatViewStmt)(nil), (*ast.ReindexStmt)(nil), (*ast.RenameStmt)(nil), (*ast.RuleStmt)(nil), (*ast.SecLabelStmt)(nil),
	(*ast.SelectStmt)(nil), (*ast.TransactionStmt)(nil), (*ast.TruncateStmt)(nil), (*ast.UnlistenStmt)(nil), (*ast.UpdateStmt)(nil),
	(*ast.VacuumStmt)(nil), (*ast.VariableSetStmt)(nil), (*ast.VariableShowStmt)(nil), (*ast.ViewStmt)(nil),
}

var nodeType = reflect.TypeFor[ast.Node]()

// layout says which fields of a node type hold nodes and which hold text.
type layout struct {
	fields []int // nodes, lists of nodes, text and lists of text, in order
	texts  []int
}

var layouts = buildLayouts()

func buildLayouts() map[reflect.Type]*layout {
	m := make(map[reflect.Type]*layout, len(expressionNodes)+len(statementNodes))
	for _, nodes := range [][]ast.Node{expressionNodes, statementNodes} {
		for _, n := range nodes {
			t := reflect.TypeOf(n).Elem()
			m[t] = layoutOf(t)
		}
	}
	return m
}

func layoutOf(t reflect.Type) *layout {
	l := &layout{}
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			continue // BaseNode, BaseExpr: tag and location
		}
		switch k := f.Type.Kind(); {
		case f.Type.Implements(nodeType):
			l.fields = append(l.fields, i)
		case k == reflect.Slice && f.Type.Elem().Implements(nodeType):
			l.fields = append(l.fields, i)
		case k == reflect.String, k == reflect.Slice && f.Type.Elem().Kind() == reflect.String:
			l.texts = append(l.texts, i)
		case k >= reflect.Bool && k <= reflect.Float64:
		case k == reflect.Slice && f.Type.Elem().Kind() >= reflect.Bool && f.Type.Elem().Kind() <= reflect.Float64:
		default:
			panic(fmt.Sprintf("sql: %s.%s of type %s cannot be walked", t, f.Name, f.Type))
		}
	}
	return l
}

// isNil says whether n is nil or a nil pointer in an interface.
func isNil(n ast.Node) bool {
	if n == nil {
		return true
	}
	v := reflect.ValueOf(n)
	return v.Kind() == reflect.Pointer && v.IsNil()
}

// eachChild calls f for every node that n holds directly, in order. It
// returns false for a type that is not listed above.
func eachChild(n ast.Node, f func(ast.Node)) bool {
	switch n := n.(type) { // what most trees are made of, without reflection
	case *ast.NodeList:
		for _, item := range n.Items {
			if !isNil(item) {
				f(item)
			}
		}
		return true
	case *ast.String, *ast.Integer, *ast.Float, *ast.Boolean, *ast.Null, *ast.ParamRef, *ast.A_Star:
		return true
	case *ast.ColumnRef:
		if n.Fields != nil {
			f(n.Fields)
		}
		return true
	}
	v := reflect.ValueOf(n)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return false
	}
	v = v.Elem()
	l := layouts[v.Type()]
	if l == nil {
		return false
	}
	for _, i := range l.fields {
		fv := v.Field(i)
		switch fv.Kind() {
		case reflect.Slice:
			for j := range fv.Len() {
				visitField(fv.Index(j), f)
			}
		default:
			visitField(fv, f)
		}
	}
	return true
}

func visitField(fv reflect.Value, f func(ast.Node)) {
	if fv.IsNil() {
		return
	}
	n := fv.Interface().(ast.Node)
	if fv.Kind() == reflect.Interface && isNil(n) {
		return
	}
	f(n)
}

// eachText calls f for every text that n holds directly.
func eachText(n ast.Node, f func(string)) {
	switch n := n.(type) {
	case *ast.String:
		f(n.SVal)
		return
	case *ast.NodeList, *ast.ColumnRef, *ast.Integer, *ast.Boolean, *ast.Null, *ast.ParamRef, *ast.A_Star:
		return
	}
	v := reflect.ValueOf(n).Elem()
	for _, i := range layouts[v.Type()].texts {
		fv := v.Field(i)
		if fv.Kind() == reflect.Slice {
			for j := range fv.Len() {
				f(fv.Index(j).String())
			}
			continue
		}
		if s := fv.String(); s != "" {
			f(s)
		}
	}
}
